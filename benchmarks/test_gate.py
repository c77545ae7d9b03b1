"""The regression gate, on made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gate, results, runner
from benchmarks.made_up import layer_result, result_of, stack_result, summary, timed


def verdicts(committed: dict, new: dict, margin: float = 0.15) -> dict[str, str]:
    return {row.name: row.verdict for row in gate.compare(committed, new, margin)}


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (summary(4.0), "ok"),
        (summary(3.4), "ok"),  # at the bound
        (summary(3.3), "REGRESSED"),
        (summary(3.0, 2.5, 3.5), "ok"),  # the interval reaches over the bound
        (summary(3.0, 2.5, 3.39), "REGRESSED"),
        (summary(9.0), "ok"),
    ],
)
def test_a_speedup_has_fallen_where_its_whole_interval_is_below_the_bound(new: dict, verdict: str) -> None:
    assert verdicts(stack_result(summary(4.0)), stack_result(new)) == {"test_stack": verdict}


def test_the_margin_is_a_fraction_of_the_committed_speedup() -> None:
    committed, new = stack_result(summary(4.0)), stack_result(summary(3.0))
    assert verdicts(committed, new, 0.3) == {"test_stack": "ok"}
    assert verdicts(committed, new, 0.2) == {"test_stack": "REGRESSED"}


def test_what_one_side_lacks_is_said_and_fails_nothing() -> None:
    committed = layer_result({"L1": summary(2.0), "L2": summary(2.0)})
    new = layer_result({"L2": summary(2.0), "VGG": summary(0.1)})
    rows = gate.compare(committed, new, 0.15)
    assert {row.name: row.verdict for row in rows} == {
        "test_conv_max_pool2d[L1]": "not measured",
        "test_conv_max_pool2d[L2]": "ok",
        "test_conv_max_pool2d[VGG]": "not committed",
    }
    assert not gate.has_regressed(rows)
    text = gate.format_report(rows, committed, new, 0.15)
    assert "1 committed but not measured now" in text and "1 not committed yet" in text
    assert text.endswith("0 of 1 speed-ups are more than 15 % below the committed ones")
    with pytest.raises(results.ResultError, match="no benchmark in common"):
        gate.compare(committed, stack_result(summary(2.0)), 0.15)
    with pytest.raises(results.ResultError, match="on cuda cannot be compared with one on cpu"):
        gate.compare(committed, new | {"device": "cuda"}, 0.15)


def test_threads_against_each_other_are_no_speedup_over_a_peer() -> None:
    committed = result_of({"test_scaling[L2]": {"kind": "scaling", **timed(summary(2.0))}})
    with pytest.raises(results.ResultError, match="no benchmark in common"):
        gate.compare(committed, committed, 0.15)


def test_another_processor_is_said() -> None:
    committed, new = stack_result(summary(2.0)), stack_result(summary(2.0))
    rows = gate.compare(committed, new, 0.15)
    assert "another" not in gate.format_report(rows, committed, new, 0.15)
    new["machine_info"]["cpu"] = "CPU of today"
    text = gate.format_report(rows, committed, new, 0.15)
    assert text.startswith("another CPU than the committed result's: CPU of today, not x")


def test_the_baseline_is_the_newest_of_the_same_processor(tmp_path: Path) -> None:
    for name, cpu, date, suite in (
        ("a", "this", "2020-01-01", "quick"),
        ("b", "this", "2020-01-02", "quick"),
        ("c", "that", "2020-01-03", "quick"),
        ("d", "this", "2020-01-04", "full"),
    ):
        result = stack_result(summary(2.0))
        result |= {"suite": suite, "datetime": date}
        result["machine_info"]["cpu"] = cpu
        results.save(result, tmp_path / f"{name}.json")
    assert gate.find_baseline(tmp_path, "this")[0].name == "b.json"
    assert gate.find_baseline(tmp_path, "unknown")[0].name == "c.json"
    (tmp_path / "none").mkdir()
    with pytest.raises(results.ResultError, match="holds no result of the suite 'quick'"):
        gate.find_baseline(tmp_path / "none")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed, new = tmp_path / "committed.json", tmp_path / "new.json"
    results.save(stack_result(summary(4.0)), committed)
    results.save(stack_result(summary(3.0)), new)
    command = ["gate", str(new), "--baseline", str(committed)]
    assert runner.main(command) == runner.EXIT_FAILED
    assert "REGRESSED  4.00x      3.00x (3.00 to 3.00)  3.40x  test_stack" in capsys.readouterr().out
    assert runner.main([*command, "--margin", "0.3"]) == runner.EXIT_OK
    for margin in ("1", "-0.1", "much"):
        with pytest.raises(SystemExit, match="2"):
            runner.main([*command, "--margin", margin])
    new.write_text(json.dumps({"suite": "quick"}))
    assert runner.main(command) == runner.EXIT_FAILED
    assert "new.json does not follow the schema" in capsys.readouterr().err


def test_nothing_is_measured_without_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "_measure_suite", lambda options: pytest.fail("it measures"))
    assert runner.main(["gate"]) == runner.EXIT_FAILED
    assert "holds no result of the suite 'quick'" in capsys.readouterr().err


def test_a_suite_that_fails_fails_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = tmp_path / "committed.json"
    results.save(stack_result(summary(4.0)), committed)
    for ended_well, code in ((True, runner.EXIT_OK), (False, runner.EXIT_FAILED)):
        measured = stack_result(summary(4.0)), ended_well
        monkeypatch.setattr(runner, "_measure_suite", lambda options, measured=measured: measured)
        assert runner.main(["gate", "--baseline", str(committed)]) == code
