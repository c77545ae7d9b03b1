"""The HTML report, on made-up results: its content as text, and the page itself in a headless Chromium."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import comparison, report_html, report_terminal, results, runner
from benchmarks.made_up import layer_result, result_of, summary, timed

HOSTILE = '<script>alert("x")</script>'
PHONE_WIDTH = 375


def sample() -> dict[str, Any]:
    """Every kind of table: wins, a loss, a tie, bounds, scaling, memory, a benchmark that failed."""
    result = layer_result(
        {
            "L1": summary(3.0, 2.9, 3.1),
            "VGG": summary(0.5, 0.4, 0.6),
            "KSH2": summary(1.1, 0.9, 1.2),
            "L2": summary(12.0, 11.0, 13.0),
        }
    )
    peaks = {"gflops": 100.0, "method": "FMA loop", "copy_gb_per_second": 10.0}
    for benchmark in result["benchmarks"]:
        benchmark["extra_info"] |= {"peaks": peaks, "left_out": {"torch.compile": "not in this suite"}}
        benchmark["extra_info"]["implementations"]["pyconv channels_last"]["fraction_of_roofline"] = 0.25
    dropout = timed(summary(20.0))
    dropout["implementations"]["two copies"] = {
        "role": "bound",
        "layout": "",
        "threads": 1,
        "seconds": summary(5e-4),
        "ratio_to_ours": summary(0.5),
        "ours_minus_this_seconds": summary(5e-4),
    }
    saved = {
        "pyconv NCHW": {"role": "ours", "value": 1.0},
        "torch eager": {"role": "peer", "value": 24.0},
    }
    peak = {"pyconv": {"role": "ours", "value": 2.0**20}, "torch": {"role": "peer", "value": 2.0**22}}
    facts = {"device": "cpu", "batch": 2, "precision": "float32", "ours": "pyconv"}
    result["benchmarks"] += result_of(
        {
            "test_dropout": {"kind": "dropout", "shape": "p=0.5", "elements": 2**20, "phase": "full", **dropout},
            "test_scaling[L2]": {"kind": "scaling", "shape": "L2", "same_bits": True, **timed(summary(1.9))},
            "test_saved_bytes": {
                "kind": "saved_bytes",
                "shape": "L2",
                "unit": "bytes per pooled element",
                "values": saved,
                **facts,
            },
            "test_peak_memory": {
                "kind": "peak_memory",
                "shape": "KSH1",
                "unit": "bytes",
                "values": peak,
                **facts,
            },
        }
    )["benchmarks"]
    result["not_measured"] = {"bench_x.py::test_x": f"RuntimeError: {HOSTILE}"}
    result["machine_info"]["cpu"] = f'{HOSTILE} & "quotes"'
    assert list(results.validate(result)) == []
    return result


def on_a_gpu(result: dict[str, Any]) -> dict[str, Any]:
    """The same figures as a GPU's, half as good with a flushed cache."""
    result |= {"device": "cuda", "suite": "gpu"}
    result["machine_info"]["gpu"] = {"name": "GPU of the test", "capability": "9.0", "cuda": "13", "cudnn": 9}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        info["device"] = "cuda"
        for entry in info.get("implementations", {}).values():
            keys = ("ratio_to_ours", "speedup_over_best_peer")
            flushed = {key: {k: v / 2 for k, v in entry[key].items()} for key in keys if key in entry}
            entry["flushed_l2"] = {"seconds": entry["seconds"], **flushed}
    assert list(results.validate(result)) == []
    return result


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


# ------------------------------------------------------------------------------------------------------------
# What the page says
# ------------------------------------------------------------------------------------------------------------


def test_outcome_needs_the_whole_interval_on_one_side() -> None:
    found = {c.info["shape"]: c.outcome for c in comparison.comparisons(sample()) if "batch" in c.info}
    assert found == {"L1": "faster", "VGG": "slower", "KSH2": "even", "L2": "faster"}


def test_page_and_terminal_say_the_same_of_wins_and_losses() -> None:
    text = text_of(report_html.render([("sample", sample())]))
    sentence = "3 of 5 cells faster than the best peer, 1 slower, 1 even (the 95 % interval holds 1x)"
    assert sentence in text and sentence in report_terminal.format_result(sample())
    assert "slower 0.50x (0.40 to 0.60) VGG, N = 10, float32, forward + backward, 1 thread" in text
    assert "faster 3.00x 2.90 to 3.10" in text and "25 %" in text
    assert "KSH2: 96x27x27, 256 kernels 5x5, padding 2, 2 groups, pool 3x3, stride 2" in text
    assert "torch.compile was not timed: not in this suite" in text
    assert "less 1.00 B 24.00 B" in text and "less 1 MiB 4 MiB" in text
    assert "two copies 2.00x 500 us" in text
    assert "peak float32, 1 thread 100 GFLOP/s (FMA loop), copy 10 GB/s" in text
    assert "C5 missed worst cell never below the best peer" in text


def test_every_slower_cell_is_named_at_the_top() -> None:
    shapes = ("L1", "L2", "VGG", "KSH1", "KSH2")
    page = report_html.render([("losses", layer_result({shape: summary(0.5) for shape in shapes}))])
    overview = text_of(page.split("</section>")[0])
    assert "every slower cell" in overview
    assert all(f"slower 0.50x (0.50 to 0.50) {shape}, N = 10" in overview for shape in shapes)


def test_page_needs_nothing_else_and_what_results_say_is_text() -> None:
    page = report_html.render([("sample", sample()), (f"name {HOSTILE}", sample())])
    assert "alert(" in page and HOSTILE not in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,", "#result-1", "#result-2"}
    assert not re.search(r"https?:|@import|url\(", page)


def test_page_depends_on_the_results_alone() -> None:
    assert report_html.render([("sample", sample())]) == report_html.render([("sample", sample())])


def test_a_gpu_counts_with_its_worse_cache_and_comes_after_the_cpu(tmp_path: Path) -> None:
    results.save(on_a_gpu(sample()), tmp_path / "a.json")
    results.save(sample(), tmp_path / "b.json")
    found = report_html.load_all([tmp_path])
    assert [name for name, _ in found] == ["b", "a"]
    text = text_of(report_html.render(found))
    assert "a: suite gpu on a GPU" in text and "GPU of the test, compute capability 9.0" in text
    assert "6.00x 5.50 to 6.50" in text and "flushed L2 cache" in text


@pytest.mark.parametrize("ratios", [(1.0,), (0.05, 300.0), (1.02,), (0.9999, 1.0001), (7.0, 7.0)])
def test_axis_holds_one_and_every_median(ratios: tuple[float, ...]) -> None:
    found = [comparison.Comparison("", ratio, ratio / 1e6, ratio * 1e6, {}) for ratio in ratios]
    axis = report_html.LogAxis(found)
    places = [place for place, _ in axis.ticks]
    assert places == sorted(places) and 2 <= len(places) <= 8
    assert axis.one in places
    for c in found:
        bar = axis.bar(c)
        assert 0 <= bar["x"] and bar["x"] + bar["width"] <= axis.width
        assert 0 <= bar["line"][0] <= bar["line"][1] <= axis.width and bar["ends"] == []


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.save(sample(), tmp_path / "sample.json")
    output = tmp_path / "report.html"
    assert runner.main(["report", "--results", str(tmp_path), "--output", str(output)]) == runner.EXIT_OK
    assert output.read_text(encoding="utf-8") == report_html.render([("sample", sample())])
    assert "sample: 3 of 5 cells faster" in capsys.readouterr().out


def test_committed_results_make_a_page() -> None:
    found = report_html.load_all([runner.RESULTS])
    page = report_html.render(found)
    assert all(f">{name}</a>" in page for name, _ in found)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "holds no result"),
        (b'{"suite": ', "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        (b'{"load_before": NaN}', "NaN is no number of JSON"),
        (b"[]", "does not follow the schema"),
    ],
)
def test_bad_results_are_named(
    content: bytes | None, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    output = tmp_path / "report.html"
    command = ["report", "--results", str(tmp_path), "--output", str(output)]
    assert runner.main(command) == runner.EXIT_FAILED
    error = capsys.readouterr().err
    assert fault in error and str(tmp_path) in error and not output.exists()


def test_places_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.save(sample(), tmp_path / "sample.json")
    missing = tmp_path / "missing"
    assert runner.main(["report", "--results", str(missing)]) == runner.EXIT_FAILED
    assert "missing: No such file" in capsys.readouterr().err
    command = ["report", "--results", str(tmp_path), "--output", str(missing / "report.html")]
    assert runner.main(command) == runner.EXIT_FAILED
    assert "could not be written: No such file" in capsys.readouterr().err
    assert runner.main(["run", "--json", str(missing / "result.json")]) == runner.EXIT_USAGE
    assert f"there is no folder {missing}" in capsys.readouterr().err


def test_names_of_implementations_and_signs_of_times_are_checked() -> None:
    result = sample()
    info = result["benchmarks"][0]["extra_info"]
    info |= {"ours": "nobody", "best_peer": "no peer"}
    assert len(list(results.validate(result))) == 2
    info["implementations"]["pyconv channels_last"]["speedup_over_best_peer"]["low"] = 0.0
    assert any("is 0.0, expected more than 0" in fault for fault in results.validate(result))


# ------------------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    """The browser with the report of a CPU and a GPU open; its console must be empty in the end."""
    path = tmp_path / "report.html"
    path.write_text(report_html.render([("cpu", sample()), ("gpu", on_a_gpu(sample()))]), encoding="utf-8")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def speed_table(page: Any) -> Any:
    """That of the layers."""
    return page.find_element("xpath", "(//h3[text()='Layers'])[1]/following-sibling::div[1]/table")


def column(table: Any, title: str) -> list[str]:
    """The texts of a column from top to bottom."""
    titles = [header.text.rstrip("↑↓↕") for header in table.find_elements("xpath", "./thead/tr/th")]
    position = titles.index(title) + 1
    return [cell.text for cell in table.find_elements("xpath", f"./tbody/tr[1]/*[{position}]")]


def header(table: Any, title: str) -> Any:
    return table.find_element("xpath", f"./thead/tr/th[normalize-space()='{title}']")


def test_a_click_on_a_header_sorts_the_table(page: Any) -> None:
    table = speed_table(page)
    assert column(table, "Speed-up") == ["0.50x", "1.10x", "3.00x", "12.0x"], "worst first"
    time = header(table, "Time")
    time.find_element("tag name", "button").click()
    assert column(table, "Time") == ["250 ms", "333 ms", "500 ms", "1 s"]
    assert column(table, "Case") == ["L2", "KSH2", "VGG", "L1"]
    assert time.get_attribute("aria-sort") == "ascending"
    assert header(table, "Speed-up").get_attribute("aria-sort") is None
    time.find_element("tag name", "button").click()
    assert column(table, "Case") == ["L1", "VGG", "KSH2", "L2"]
    assert time.get_attribute("aria-sort") == "descending"


def test_a_table_is_sorted_from_the_keyboard_and_its_rows_stay_together(page: Any) -> None:
    table = speed_table(page)
    case = header(table, "Case")
    case.find_element("tag name", "button").send_keys("\n")
    assert column(table, "Case") == ["KSH2", "L1", "L2", "VGG"]
    for body in table.find_elements("xpath", "./tbody"):
        shape, details = body.find_element("tag name", "th").text, body.find_element("tag name", "details")
        details.find_element("tag name", "summary").click()
        assert f"test_conv_max_pool2d[{shape}]" in details.text and "torch eager NCHW" in details.text


def test_the_page_fits_a_phone(page: Any) -> None:
    metrics = {"width": PHONE_WIDTH, "height": 700, "deviceScaleFactor": 2, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        assert page.execute_script("return innerWidth") == PHONE_WIDTH
        assert page.execute_script("return document.documentElement.scrollWidth") <= PHONE_WIDTH
        assert speed_table(page).size["width"] > PHONE_WIDTH, "a wide table scrolls in its frame"
        summary = speed_table(page).find_element("tag name", "summary").text
        assert "slower" in summary and "0.50x" in summary
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
