"""The harness itself: statistics, interleaving, schema, goal table. No figure is measured here."""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
import threading
import time

import pytest
import torch

from benchmarks import bench_ksh, goals, limits, memory, peers, report_terminal, results, runner, timing
from benchmarks.journal import DIED, ROUNDS, Journal
from benchmarks.made_up import stack_result, summary
from benchmarks.shapes import CASES, PHASES, case_named, flops, min_bytes
from benchmarks.suites import SUITES

# ------------------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------------------


def test_summary_holds_median_deciles_and_interval() -> None:
    sample = [float(i) for i in range(11)]
    got = timing.Summary.of(sample[::-1])
    # Of 11 values, at most 1 lies below the median with probability 12 / 2^11 = 0.006, at most 2 with 0.033.
    assert got == timing.Summary(5.0, 1.0, 9.0, 1.0, 9.0)


@pytest.mark.parametrize("n", range(6, 62))
def test_interval_covers_the_median_with_95_percent_and_no_smaller_one_does(n: int) -> None:
    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(rank + 1)) / 2**n

    rank = timing._interval_rank(n)
    assert coverage(rank) >= 0.95 > coverage(rank + 1)


def test_rounds_interleave_and_ratios_are_formed_within_a_round() -> None:
    log: list[str] = []

    def candidate(name: str, role: timing.Role) -> timing.Candidate:
        return timing.Candidate(name, role, lambda: log.append(name), warm_up=False)

    class Plugin:
        def pedantic(self, target, setup, rounds, iterations):
            log.clear()
            for _ in range(rounds):
                setup()
                target()

    candidates = [candidate("ours", "ours"), candidate("a", "peer"), candidate("b", "bound")]
    samples = timing.run_rounds(Plugin(), candidates, budget_seconds=0.0)
    order = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    assert order[:6] == ["a", "b", "ours", "b", "a", "ours"]
    assert {len(seconds) for seconds in samples.seconds.values()} == {timing.MIN_ROUNDS}
    assert samples.best_peer == "a"

    made = timing.Samples(
        candidates, {"ours": [1.0, 2.0, 4.0], "a": [3.0, 6.0, 12.0], "b": [1.0, 1.0, 1.0]}, 1
    )
    assert made.ratio("a", "ours") == timing.Summary(3.0, 3.0, 3.0, 3.0, 3.0)
    assert made.report()["implementations"]["ours"]["speedup_over_best_peer"]["median"] == 3.0
    assert made.report()["implementations"]["b"]["ours_minus_this_seconds"]["median"] == 1.0


@pytest.mark.parametrize(("longest_warmed", "calls_per_block"), [(1.0, 2), (0.0, 1)])
def test_a_long_call_is_its_own_warm_up(
    longest_warmed: float, calls_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Plugin:
        def pedantic(self, target, setup, rounds, iterations):
            log.clear()
            setup()
            target()

    monkeypatch.setattr(timing, "WARM_CALL_SECONDS", longest_warmed)
    monkeypatch.setattr(timing, "MAX_CALLS", 1)
    names: tuple[tuple[str, timing.Role], ...] = (("ours", "ours"), ("a", "peer"))
    candidates = [timing.Candidate(name, role, lambda name=name: log.append(name)) for name, role in names]
    timing.run_rounds(Plugin(), candidates, budget_seconds=0.0)
    assert log == ["a"] * calls_per_block + ["ours"] * calls_per_block


def test_the_own_account_of_a_candidate_counts() -> None:
    seconds = iter([100.0, 1.0, 2.0])  # the first belongs to the warm-up
    candidate = timing.Candidate("ours", "ours", lambda: next(seconds), own_account=True)
    assert timing.Timer().block(candidate, 2).seconds == 1.5


def test_a_wrong_answer_is_not_timed() -> None:
    case = case_named("L2", 2)
    problem = peers.make_problem(case, "float32", "cpu")
    phase = PHASES["full"]
    layer = peers.conv_pool_relu(case)
    right = peers._peer(problem, peers.NCHW, phase, "right", layer)
    wrong = peers._peer(problem, peers.NCHW, phase, "wrong", lambda x, w, b: layer(x, w, b.detach() * 1.01))
    with torch.enable_grad():
        peers.candidate(problem, right, phase, 1).check()
    with pytest.raises(AssertionError, match="wrong gives a wrong answer.*output differs"):
        timing._check(peers.candidate(problem, wrong, phase, 1))


class OneRound:
    """pytest-benchmark's fixture, as far as it is used."""

    def pedantic(self, target, setup, rounds, iterations):
        setup()
        target()


def failing(name: str, role: timing.Role, error: BaseException, **attributes) -> timing.Candidate:
    def run() -> None:
        raise error

    return timing.Candidate(name, role, run, **attributes)


def test_a_candidate_that_fails_is_left_out_and_named() -> None:
    tried: list[str] = []
    candidates = [
        timing.Candidate("ours", "ours", lambda: None),
        failing("broken", "peer", RuntimeError("no valid\n  choice")),
        timing.Candidate("fatal", "peer", lambda: pytest.fail("it must not be tried again")),
        timing.Candidate("peer", "peer", lambda: None),
    ]
    samples = timing.run_rounds(OneRound(), candidates, fatal={"fatal": "it died"}, trying=tried.append)
    assert samples.failed == {"fatal": "it died", "broken": "RuntimeError: no valid choice"}
    assert tried == ["ours", "broken", "peer", ROUNDS]
    assert set(samples.report()["implementations"]) == {"ours", "peer"}
    with pytest.raises(RuntimeError, match="nothing of pyconv's could be timed: ours: ValueError: wrong"):
        timing.run_rounds(OneRound(), [failing("ours", "ours", ValueError("wrong")), candidates[-1]])


def test_compiling_gets_the_time_that_later_benchmarks_leave() -> None:
    def left(seconds: float) -> limits.TimeLeft:
        return limits.TimeLeft(time.time() + seconds, later=10, later_autotuned=2)

    base = 11 * limits.SECONDS_OF_A_BENCHMARK
    assert left(base + 9).for_compiling("max-autotune") == pytest.approx(9, abs=0.1)
    optional = base + 2 * limits.SECONDS_TO_AUTOTUNE
    assert left(optional + 9).for_compiling("default") == pytest.approx(9, abs=0.1)
    assert left(3.0).is_over() and not left(base).is_over()
    assert limits.TimeLeft().for_compiling("default") is None and not limits.TimeLeft().is_over()

    ours = timing.Candidate("ours", "ours", lambda: None)
    for mode, seconds in (("max-autotune", base - 1), ("default", optional - 1)):
        peer = failing("peer", "peer", RuntimeError("tried"), compile_mode=mode)
        samples = timing.run_rounds(OneRound(), [ours, peer], time_left=left(seconds))
        assert samples.failed == {"peer": "no time left to compile it"}
        samples = timing.run_rounds(OneRound(), [ours, peer], time_left=left(seconds + 5))
        assert samples.failed == {"peer": "RuntimeError: tried"}


def test_a_compilation_that_takes_too_long_is_stopped() -> None:
    def compile_forever() -> None:
        deadline = time.time() + 30
        while time.time() < deadline:
            try:
                time.sleep(0.01)
            except Exception:  # as a compiler tries its next choice
                continue

    peer = timing.Candidate("slow", "peer", compile_forever, compile_mode="max-autotune")
    time_left = limits.TimeLeft(time.time() + limits.SECONDS_OF_A_BENCHMARK + 0.3)
    samples = timing.run_rounds(
        OneRound(), [timing.Candidate("ours", "ours", lambda: None), peer], time_left=time_left
    )
    assert samples.failed["slow"].startswith("OutOfTime: stopped after 0 s")


# ------------------------------------------------------------------------------------------------------------
# A suite for a GPU
# ------------------------------------------------------------------------------------------------------------


def test_journal_tells_what_ended_a_process(tmp_path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(machine_info={"gpu": 1})
    journal.append(trying="a", test="first")
    journal.append(trying="b", test="first")
    assert journal.read().fatal == {"first": {"b": DIED}}
    journal.append(machine_info={"gpu": 1})
    journal.append(trying="a", test="first")
    journal.append(trying=ROUNDS, test="first")
    journal.append(benchmark={"fullname": "first"})
    journal.append(trying="c", test="second")
    journal.append(fatal="c", test="second", reason="an illegal access")
    journal.append(machine_info={"gpu": 1})
    journal.append(trying=ROUNDS, test="third")
    with journal.path.open("a") as file:
        file.write('{"not_measured": "four')
    progress = journal.read()
    assert progress.fatal == {"first": {"b": DIED}, "second": {"c": "an illegal access"}}
    assert progress.done() == {"first", "third"} and progress.machine_info == {"gpu": 1}
    assert "third" in progress.not_measured


def test_headline_and_goals_on_a_gpu_take_the_fastest_of_ours_and_the_worse_cache() -> None:
    candidates = [timing.Candidate(name, role, lambda: None) for name, role in (
        ("pyconv NCHW", "ours"), ("pyconv channels_last", "ours"), ("torch eager NCHW", "peer"),
    )]  # fmt: skip
    warm = {"pyconv NCHW": [3.0], "pyconv channels_last": [1.0], "torch eager NCHW": [4.0]}
    flushed = {"pyconv NCHW": [3.0], "pyconv channels_last": [2.0], "torch eager NCHW": [5.0]}
    report = timing.Samples(candidates, warm, 1, flushed).report()
    assert report["ours"] == "pyconv channels_last"
    entry = report["implementations"]["torch eager NCHW"]
    assert entry["ratio_to_ours"]["median"] == 4.0 and entry["flushed_l2"]["ratio_to_ours"]["median"] == 2.5
    assert goals.over_best_peer(report) == (2.5, 2.5, 2.5)
    assert goals.over_best_of("torch eager")(report) == (2.5, 2.5, 2.5)
    bound = {"implementations": {"copy": {"ratio_to_ours": summary(0.5)}}, "bytes_over_bound": 1.5}
    assert goals.percent_of_bound("copy")(bound)[0] == 75.0


def run_gpu_suite(tmp_path, monkeypatch, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p benchmarks.fake_cuda")
    monkeypatch.setattr(runner, "_no_gpu", lambda: None)
    path = tmp_path / "gpu.json"
    code = runner.main(["run", "--suite", "gpu", "--budget", "0.001", "--json", str(path), *arguments])
    return code, results.load(path)


def test_the_suite_for_a_gpu_on_a_fake_one(tmp_path, monkeypatch, capfd) -> None:
    """Every file of it; the process dies in the first capture, and another goes on."""
    monkeypatch.setenv("PYCONV_FAKE_CUDA_FAULT", str(tmp_path / "fault"))
    some = "peaks or saved or peak_memory or (relu and 0.5) or experiment6"
    some += " or KSH1-N128-tf32-forward or KSH1-N128-tf32-full-t1"
    code, result = run_gpu_suite(tmp_path, monkeypatch, "-k", some)
    assert code == runner.EXIT_FAILED, "a process died"
    assert result["not_measured"] == {} and len(result["benchmarks"]) == 1 + 4 + 2 + 1 + 2
    by_name = {benchmark["name"]: benchmark["extra_info"] for benchmark in result["benchmarks"]}
    forward = by_name["test_conv_max_pool2d[KSH1-N128-tf32-forward_inference-t1]"]
    autotuned = {f"torch.compile max-autotune channels_last {order}" for order in peers.ORDERS}
    assert forward["failed"] == {
        "torch eager CUDA graph NCHW conv-pool-relu": DIED,
        **dict.fromkeys(autotuned, "RuntimeError: no valid choice for this convolution"),
    }
    full = by_name["test_conv_max_pool2d[KSH1-N128-tf32-full-t1]"]
    assert set(full["failed"]) == autotuned
    assert {entry["role"] for entry in full["implementations"].values()} == {"ours", "peer"}
    for entry in full["implementations"].values():
        assert entry["fraction_of_roofline"] > 0 and entry["flushed_l2"]["seconds"]["median"] > 0
    rows = {(row.goal.id, row.metric.what): row for row in goals.evaluate(result)}
    assert rows["G1", "full, tf32: eager"].figures is not None
    assert rows["G4", "relu + dropout backward"].figures is not None
    assert rows["M2", "fraction of the best eager's"].figures is not None
    assert rows["G1", "full, tf32: max-autotune"].verdict == goals.NOT_MEASURED
    output = capfd.readouterr().out
    assert output.rstrip().endswith(goals.format_table(result)), "the goal table comes last"
    assert "another takes up the rest" in output


def test_a_suite_out_of_time_still_prints_its_table(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p benchmarks.fake_cuda")
    monkeypatch.setattr(runner, "_no_gpu", lambda: None)
    path = tmp_path / "gpu.json"
    assert runner.main(["run", "--suite", "gpu", "-k", "peaks", "--limit", "1", "--json", str(path)]) == 1
    output = capfd.readouterr()
    assert "test_peaks: Skipped: the suite's time was over" in output.err and not path.exists()
    assert "G1 KSH1" in output.out and output.out.rstrip().endswith(goals.NOT_MEASURED)


@pytest.mark.parametrize(("seconds", "signalled"), [(0.5, False), (None, True)])
def test_a_process_that_does_not_end_is_ended(seconds: float | None, signalled: bool, tmp_path) -> None:
    number = tmp_path / "number"
    program = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    if signalled:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert runner._run_child([sys.executable, "-c", program], seconds) is None
    if number.exists():  # it had begun
        with pytest.raises(ProcessLookupError):
            os.kill(int(number.read_text()), 0)


# ------------------------------------------------------------------------------------------------------------
# Costs and memory
# ------------------------------------------------------------------------------------------------------------


def test_flops_and_bytes_of_the_second_layer() -> None:
    case = case_named("L2")
    one = 2 * 10 * 40 * 8 * 8 * 20 * 25
    assert [flops(case, PHASES[name]) for name in ("forward_inference", "full_no_input_grad", "full")] == [
        one,
        2 * one,
        3 * one,
    ]
    x, w, b, y = 10 * 20 * 144, 40 * 20 * 25, 40, 10 * 40 * 16
    assert min_bytes(case, PHASES["forward_inference"], 4) == 4 * (x + w + b + y)
    assert min_bytes(case, PHASES["backward_no_input_grad"], 4) == 4 * (y + x + w + b) + y


def test_saved_bytes_counts_what_is_saved_beyond_input_and_output() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp(), [x]) == 0  # saves its result
    assert memory.saved_bytes(lambda: x.sin(), [x]) == 0  # saves its input
    assert memory.saved_bytes(lambda: x.exp().sin(), [x]) == 4000


# ------------------------------------------------------------------------------------------------------------
# Suites, results, goals
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: f"suite-{suite.name}")
def test_suites_name_existing_shapes_and_no_cell_twice(suite) -> None:
    names = {case.name for case in CASES}
    assert {cell.shape for cell in suite.cells} | {*suite.memory_shapes, *suite.scaling_shapes} <= names
    assert len({cell.id() for cell in suite.cells}) == len(suite.cells)


@pytest.mark.parametrize("order", peers.ORDERS)
def test_the_peers_of_ksh_have_its_layers(order: str) -> None:
    with torch.device("meta"):
        ours, theirs = bench_ksh.ksh(), bench_ksh.torch_ksh(order, p_dropout=0.5)
        x = torch.empty(2, 3, 224, 224)
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]
    assert theirs(x).shape == ours(x).shape
    assert [m.p for m in theirs if isinstance(m, torch.nn.Dropout)] == [m.p for m in ours if hasattr(m, "p")]


def test_result_survives_saving(tmp_path) -> None:
    result = stack_result(summary(5.0))
    results.save(result, tmp_path / "result.json")
    assert results.load(tmp_path / "result.json") == result


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda r: r["machine_info"].update(node="a host name"), "unexpected 'node'"),
        (lambda r: r.pop("suite"), "lacks 'suite'"),
        (lambda r: r["benchmarks"][0]["extra_info"].update(kind="other"), "expected one of"),
        (lambda r: r["benchmarks"][0]["extra_info"].update(rounds=True), "type bool, expected integer"),
        (lambda r: r["benchmarks"][0]["stats"].update(data=[1.0]), "type list"),
    ],
)
def test_schema_refuses(spoil, fault: str, tmp_path) -> None:
    result = stack_result(summary(5.0))
    spoil(result)
    results.save(result, tmp_path / "spoiled.json")
    with pytest.raises(results.ResultError, match=fault):
        results.load(tmp_path / "spoiled.json")


def test_truncated_result_is_an_error(tmp_path) -> None:
    (tmp_path / "cut.json").write_text('{"suite": ', encoding="utf-8")
    with pytest.raises(results.ResultError, match="cut.json: expected JSON"):
        results.load(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("median", "verdict"), [(3.9, "MISSED"), (4.0, "met"), (5.9, "met"), (6.0, "stretch met")]
)
def test_verdict_of_a_goal_that_is_a_lower_bound(median: float, verdict: str) -> None:
    row = next(goals.evaluate(stack_result(summary(median))))
    assert (row.goal.id, row.metric.what, row.verdict) == ("C1", "against the best peer", verdict)


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((3.9, 3.8, 3.95), "MISSED"),
        ((3.9, 3.8, 4.0), "MISSED, within noise"),
        ((4.2, 3.9, 4.5), "met, within noise"),
        ((4.2, 4.0, 4.5), "met"),
        ((6.2, 5.9, 6.5), "stretch met, within noise"),
    ],
)
def test_a_verdict_says_whether_the_interval_allows_the_other_one(
    figures: tuple[float, float, float], verdict: str
) -> None:
    row = next(goals.evaluate(stack_result(summary(*figures))))
    assert goals.texts(row)[4] == verdict


def test_a_second_core_that_adds_little_is_said() -> None:
    result = stack_result(summary(5.0))
    infos = [copy.deepcopy(result["benchmarks"][0]["extra_info"]) for _ in range(2)]
    for info, threads, rate in zip(infos, (1, 2), (100.0, 149.0), strict=True):
        peak = {"gflops": rate, "copy_gb_per_second": 10.0, "method": "FMA loop"}
        info.update(threads=threads, precision="float32", peaks=peak)
    result["benchmarks"] = [{"name": "one", "extra_info": info} for info in infos]
    assert report_terminal.second_core(result) == [
        "two threads reach only 1.49 times one thread's peak: the cores are shared or busy, and figures of 2 threads "
        "say little"
    ]
    infos[1]["peaks"]["gflops"] = 150.0
    assert report_terminal.second_core(result) == []


def test_the_worst_benchmark_decides() -> None:
    result = stack_result(summary(7.0))
    slower = copy.deepcopy(result["benchmarks"][0])
    slower["name"] = "slower"
    slower["extra_info"]["implementations"]["pyconv channels_last"]["speedup_over_best_peer"] = summary(2.0)
    result["benchmarks"].append(slower)
    row = next(goals.evaluate(result))
    assert (row.figures[0], row.where, row.count, row.verdict) == (2.0, "slower", 2, "MISSED")


def test_never_below_counts_the_lower_end_of_the_interval() -> None:
    result = stack_result(summary(1.2, 0.9, 1.5))
    result["benchmarks"][0]["extra_info"]["kind"] = "conv_max_pool2d"
    (row,) = (row for row in goals.evaluate(result) if row.goal.id == "C5")
    assert row.verdict == "MISSED"


def test_saved_bytes_goal_is_an_upper_bound() -> None:
    result = stack_result(summary(5.0))
    values = {"pyconv": {"role": "ours", "value": 1.0}, "torch": {"role": "peer", "value": 24.0}}
    result["benchmarks"][0]["extra_info"] = {
        "kind": "saved_bytes",
        "device": "cpu",
        "shape": "L2",
        "unit": "bytes",
        "values": values,
    }
    assert list(results.validate(result)) == []
    (row,) = (row for row in goals.evaluate(result) if row.goal.id == "M1")
    assert row.verdict == "met"
    values["pyconv"]["value"] = 1.1
    (row,) = (row for row in goals.evaluate(result) if row.goal.id == "M1")
    assert row.verdict == "MISSED"


def test_every_goal_is_in_the_table_measured_or_not() -> None:
    table = goals.format_table(stack_result(summary(5.0)))
    starts = {line.split(" ")[0] for line in table.splitlines()}
    assert {f"C{i}" for i in range(1, 12)} | {"M1", "M2", "M3"} <= starts
    assert "G1" not in starts
    assert goals.NOT_MEASURED in table


def test_goals_of_several_runs_take_the_median_and_show_the_extremes() -> None:
    runs = [stack_result(summary(median)) for median in (4.5, 3.5, 4.2)]
    line = next(line for line in goals.format_runs(runs).splitlines() if "against the best peer" in line)
    assert "4.2x (3.5 to 4.5)" in line and " met" in line
    assert goals.format_runs(runs[:1]) == goals.format_table(runs[0])
    runs[1]["benchmarks"] = []
    line = next(line for line in goals.format_runs(runs).splitlines() if "against the best peer" in line)
    assert "4.35x (4.2 to 4.5, in 2 runs)" in line
    suite = runs[0]["suite"]
    runs[0]["suite"] = "other"
    with pytest.raises(ValueError, match=f"runs of one suite, but got runs of other and {suite}"):
        goals.format_runs(runs)
    runs[0]["suite"], runs[0]["device"] = suite, "cuda"
    with pytest.raises(ValueError, match="runs of one device, but got runs of cpu and cuda"):
        goals.format_runs(runs)


def test_report_marks_a_loss() -> None:
    won = report_terminal.format_result(stack_result(summary(5.0)))
    lost = report_terminal.format_result(stack_result(summary(0.9)))
    assert not any(line.startswith("!   ") for line in won.splitlines())
    assert any(line.startswith("!   0.90x") for line in lost.splitlines())


_COMMANDS = ("run", "goals", "show", "report", "gate", "mnist", "profile", "recipe")


@pytest.mark.parametrize("command", [[], *([name] for name in _COMMANDS)], ids=" ".join)
def test_every_command_has_a_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main([*command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: python -m benchmarks", *command]))
