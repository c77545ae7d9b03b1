"""The build: missing tools, the one source list, the objects of each ISA, the C++ tests, choosing an ISA."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pyconv

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ROOT / "cmake" / "build_tools.py"
BUILD_DIR = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
CHECKS_OF_SETUP = ("torch", "cmake", "ninja", "compiler", "headers")

needs_build_dir = pytest.mark.skipif(not BUILD_DIR.is_dir(), reason="pyconv was not built in this checkout")


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `command` in the root of the checkout; `env` is added to this process's environment."""
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )


def only_line(text: str) -> str:
    """The one line that `text` consists of."""
    lines = text.splitlines()
    assert len(lines) == 1, f"expected one line, got:\n{text}"
    return lines[0]


# ----------------------------------------------------------------------------------------------------------
# What is missing is said in one line
# ----------------------------------------------------------------------------------------------------------


def bare_python(directory: Path) -> Path:
    """A Python whose directory holds no cmake and no ninja and which sees no installed package."""
    python = directory / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def only_setuptools(directory: Path) -> dict[str, str]:
    """PYTHONPATH to a directory that holds setuptools and nothing else."""
    installed = Path(pytest.importorskip("setuptools").__file__).parent
    site = directory / "site"
    site.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (site / name).symlink_to(installed.parent / name)
    return {"PYTHONPATH": str(site)}


def test_all_tools_of_this_environment_are_found() -> None:
    result = run(sys.executable, BUILD_TOOLS, *CHECKS_OF_SETUP)
    assert (result.returncode, result.stderr) == (0, "")


def test_missing_torch_is_one_line(tmp_path: Path) -> None:
    result = run(bare_python(tmp_path), BUILD_TOOLS, *CHECKS_OF_SETUP)
    assert result.returncode == 1
    assert re.fullmatch(
        r"pyconv: PyTorch is missing; install it .*pip install torch.*", only_line(result.stderr)
    )


def test_old_torch_is_one_line(tmp_path: Path) -> None:
    metadata = tmp_path / "torch-2.9.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    result = run(sys.executable, BUILD_TOOLS, "torch", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert re.fullmatch(
        r"pyconv: PyTorch 2\.9\.1 is too old; install 2\.11 or newer .*", only_line(result.stderr)
    )


@pytest.mark.parametrize(
    "check, message",
    [
        ("cmake", r"pyconv: cmake is missing; install it \(pip install cmake\)"),
        ("ninja", r"pyconv: ninja is missing; install it \(pip install ninja\)"),
        ("compiler", r"pyconv: no C\+\+ compiler is found; install one \(.*apt-get install g\+\+\)"),
    ],
)
def test_missing_program_is_one_line(check: str, message: str, tmp_path: Path) -> None:
    python = tmp_path / "python3"  # a link: its directory is searched, and holds nothing else
    python.symlink_to(sys.executable)
    result = run(python, BUILD_TOOLS, check, env={"PATH": str(tmp_path), "CXX": ""})
    assert result.returncode == 1
    assert re.fullmatch(message, only_line(result.stderr))


def test_missing_chosen_compiler_is_named() -> None:
    result = run(sys.executable, BUILD_TOOLS, "compiler", env={"CXX": "no-such-compiler -O2"})
    assert result.returncode == 1
    assert only_line(result.stderr).startswith("pyconv: CXX=no-such-compiler is not found; install one")


@pytest.mark.parametrize(
    "stated, standard",
    [("C++ Version: 201703", "17"), ("C++ Version: 202002", "20"), ("C++ Version: 202302", "23")],
)
def test_the_build_follows_torchs_cxx_standard(
    stated: str, standard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    torch_facts = importlib.import_module("torch_facts")
    shown = f"PyTorch built with:\n  - GCC 11.2\n  - {stated}\n  - Intel(R) MKL\n"
    assert torch_facts.cxx_standard(shown) == standard
    with pytest.raises(ValueError, match="names no C\\+\\+ standard"):
        torch_facts.cxx_standard(shown.replace(stated, ""))


@pytest.mark.parametrize("command", ["build_ext", "bdist_wheel", "editable_wheel"])
def test_setup_says_only_what_is_missing(command: str, tmp_path: Path) -> None:
    """setup.py, as pip's hooks run it, stops with the one line before setuptools prints anything."""
    result = run(bare_python(tmp_path), "setup.py", command, env=only_setuptools(tmp_path))
    assert result.returncode == 1
    assert only_line(result.stderr).startswith("pyconv: PyTorch is missing;")
    assert result.stdout == ""


def test_make_says_only_what_is_missing(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    venv = tmp_path / "venv"
    result = run(make, "build", f"VENV={venv}", "PYTHON=no-such-python")
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(ours) == 1 and ours[0].startswith("pyconv: no-such-python is missing; install it")
    assert not venv.exists()


# ----------------------------------------------------------------------------------------------------------
# Whether and how to build with CUDA
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """cmake/cuda_facts.py where no CUDA compiler is found and torch is a CPU build; a test changes either."""
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    module = importlib.import_module("cuda_facts")
    for variable in ("PYCONV_CUDA", "PYCONV_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "USUAL_PLACE", tmp_path / "nvcc-is-not-here")
    monkeypatch.setattr(module, "PACKAGED_TOOLKIT", tmp_path)
    monkeypatch.setattr(module, "torch_cuda_version", lambda: None)
    return module


def fake_nvcc(directory: Path) -> Path:
    """An nvcc that only answers questions; it knows the architectures 80 and 90."""
    toolkit = directory / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "include").mkdir()
    (toolkit / "lib64" / "libcudart_static.a").touch()
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;\n"
        "  --list-gpu-arch) echo compute_80; echo compute_90;;\n"
        f"  --dryrun) echo '#$ TOP={toolkit}/bin/..' >&2;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("nvcc_is_there", [False, True])
@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_cuda_is_built_where_nvcc_and_a_cuda_torch_are(
    nvcc_is_there: bool,
    torch_cuda: str | None,
    cuda_facts: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if nvcc_is_there:
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path).parents[1]))
    monkeypatch.setattr(cuda_facts, "torch_cuda_version", lambda: torch_cuda)
    assert cuda_facts.wanted() == (nvcc_is_there and torch_cuda is not None)
    monkeypatch.setenv("PYCONV_CUDA", "0")
    assert not cuda_facts.wanted()


def test_cuda_asked_for_and_impossible_is_an_error(
    cuda_facts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYCONV_CUDA", "1")
    with pytest.raises(cuda_facts.MissingTool, match="PYCONV_CUDA=1, but nvcc is not found; install the CUDA toolkit"):
        cuda_facts.wanted()
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path)))
    with pytest.raises(cuda_facts.MissingTool, match="PYCONV_CUDA=1, but the installed PyTorch is a CPU build"):
        cuda_facts.wanted()
    monkeypatch.setenv("PYCONV_CUDA", "yes")
    with pytest.raises(cuda_facts.MissingTool, match="PYCONV_CUDA=yes is neither 0 nor 1"):
        cuda_facts.wanted()


def test_nvcc_behind_a_script_is_followed_to_its_toolkit(cuda_facts: ModuleType, tmp_path: Path) -> None:
    real = fake_nvcc(tmp_path)
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    script.chmod(0o755)
    assert cuda_facts.find_nvcc() == script
    toolkit = real.parents[1]
    listed = (script, toolkit / "lib64" / "libcudart_static.a", "80,90+PTX", toolkit / "include")
    assert cuda_facts.facts("80 90+PTX", script)[:4] == listed


@pytest.mark.parametrize(
    "chosen, message",
    [
        ("75;90", "architecture 75 is too old: the kernels need 80 or newer"),
        ("sm_90", "PYCONV_CUDA_ARCHS=sm_90: 'sm_90' is no architecture; expected numbers as in"),
        ("native", "PYCONV_CUDA_ARCHS=native, but no NVIDIA GPU is found"),
        ("80;120", r"nvcc \(release 13.0\) cannot compile for 120; set PYCONV_CUDA_ARCHS"),
    ],
)
def test_impossible_architectures_are_an_error(
    chosen: str, message: str, cuda_facts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_facts, "gpu_capabilities", list)
    with pytest.raises(cuda_facts.MissingTool, match=message):
        cuda_facts.facts(chosen, fake_nvcc(tmp_path))


def test_architectures_of_this_machines_gpus(
    cuda_facts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_facts, "gpu_capabilities", lambda: [(12, 0), (9, 0), (9, 0)])
    assert cuda_facts.architectures("native") == ["90", "120"]
    assert cuda_facts.architectures("") == ["80", "90", "100", "120+PTX"]


def test_oldest_architecture_is_the_kernels_own(cuda_facts: ModuleType) -> None:
    stated = re.search(r"kMinimumCapability = (\d+);", (ROOT / "cuda" / "kernel_table.h").read_text())
    assert stated is not None and int(stated.group(1)) == cuda_facts.OLDEST_ARCHITECTURE


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_make_says_in_one_line_that_there_is_no_gpu(target: str) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run(make, "--no-print-directory", target, f"GPU_PYTHON={sys.executable}")
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert (ours, result.stdout) == (["pyconv: no NVIDIA GPU is found"], "")


def test_pytest_knows_the_options_that_make_test_gpu_gives_it() -> None:
    """Where there is no GPU, that is all it has to say."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    planned = run(make, "--no-print-directory", "--dry-run", "test-gpu", f"GPU_PYTHON={sys.executable}")
    result = run(*shlex.split(planned.stdout.splitlines()[-1]))
    expected = "--backend=cuda: (pyconv is built without CUDA|torch finds no GPU)"
    assert re.search(expected, result.stderr), result.stdout + result.stderr


# ----------------------------------------------------------------------------------------------------------
# One source list
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux", reason="about the C++ runtime of Linux")
def test_a_compiler_that_links_its_own_cxx_runtime_is_told_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "cmake")
    native_build = importlib.import_module("native_build")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "message.cpp"
    source.write_text(
        "#include <sstream>\n"
        'extern "C" int length(int x) { std::ostringstream s; s << x; return static_cast<int>(s.str().size()); }\n'
    )

    def own_runtime(*arguments: str) -> bool:
        module = tmp_path / "message.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", module, source, *arguments], check=True)
        return native_build.has_own_cxx_runtime(module)

    static = ["-static-libstdc++", "-static-libgcc"]
    assert own_runtime(*static)
    assert not own_runtime(*static, *native_build.torchs_cxx_runtime())



def test_every_source_file_is_in_the_source_list() -> None:
    listed = set(re.findall(r"[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    listed |= {f"tests/cpp/{name}.cpp" for name in cpp_tests()}
    patterns = ("csrc/**/*.cpp", "cuda/*.cu", "tests/cpp/*.cpp", "tests/cuda/*.cpp")
    there = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    assert {name for name in listed if (ROOT / name).is_file()} == there


def test_every_python_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("pyconv/**/__init__.py")]
    assert sorted(listed) == sorted(there)


def test_version_is_stated_once_everywhere() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == pyconv.__version__
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest.group(1) == pyconv.__version__


# ----------------------------------------------------------------------------------------------------------
# What was built
# ----------------------------------------------------------------------------------------------------------


def cpp_tests() -> list[str]:
    """Names of the C++ tests, as CMakeLists.txt's foreach names them."""
    names = re.search(r"foreach\(test ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert names is not None
    return names.group(1).split()


@needs_build_dir
@pytest.mark.parametrize("isa", pyconv.compiled_isas())
def test_isa_objects_define_no_weak_symbols(isa: str) -> None:
    """A weak function compiled with AVX-512 could be the copy that the linker keeps for every caller."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    objects = sorted((BUILD_DIR / "CMakeFiles" / f"pyconv_kernels_{isa}.dir").glob("**/*.o"))
    lists = dict(re.findall(r"set\((KERNEL_SOURCES\w*)\s([^)]*)\)", (ROOT / "CMakeLists.txt").read_text()))
    sources = lists.get(f"KERNEL_SOURCES_{isa.upper()}", lists["KERNEL_SOURCES"])
    assert len(objects) == len(sources.split())
    listing = run(nm, "--defined-only", "-C", "-A", *objects)
    assert listing.returncode == 0, listing.stderr
    lines = listing.stdout.splitlines()
    assert any(re.search(rf" T .*kernel_table_{isa}\b", line) for line in lines)
    assert [line for line in lines if re.search(r" [uvVwW] ", line)] == []


@needs_build_dir
def test_cpp_tests_pass() -> None:
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ctest = shutil.which("ctest", path=beside_python)
    if ctest is None:
        pytest.skip("ctest is not installed")
    if not all((BUILD_DIR / name).exists() for name in cpp_tests()):
        pytest.skip("the C++ tests are not built (`python cmake/native_build.py tests` makes them)")
    result = run(ctest, "--test-dir", BUILD_DIR, "--output-on-failure", "--no-tests=error")
    assert result.returncode == 0, result.stdout
    for name in cpp_tests():
        assert re.search(rf"{name} \.* +Passed", result.stdout), result.stdout


# ----------------------------------------------------------------------------------------------------------
# Choosing the instruction set
# ----------------------------------------------------------------------------------------------------------


def test_environment_chooses_the_isa() -> None:
    result = run(sys.executable, "-c", "import pyconv; print(pyconv.isa())", env={"PYCONV_CPU_ISA": "scalar"})
    assert (result.returncode, result.stdout) == (0, "scalar\n"), result.stderr


def test_unknown_isa_in_the_environment_is_an_error_that_lists_the_choices() -> None:
    result = run(sys.executable, "-c", "import pyconv", env={"PYCONV_CPU_ISA": "sse9"})
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(ImportError|ValueError): .*PYCONV_CPU_ISA", message), result.stderr
    assert "'sse9'" in message
    for isa in pyconv.compiled_isas():
        assert isa in message


def test_set_isa_refuses_an_unknown_name() -> None:
    before = pyconv.isa()
    with pytest.raises(ValueError, match="sse9.*scalar"):
        pyconv.set_isa("sse9")
    assert pyconv.isa() == before
