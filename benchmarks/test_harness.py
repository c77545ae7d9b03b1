"""The harness itself: statistics, interleaving, schema, goal table. No figure is measured here."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from benchmarks import goals, memory, peers, report_terminal, results, timing
from benchmarks.shapes import CASES, PHASES, case_named, flops, min_bytes
from benchmarks.suites import SUITES


def summary(median: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    low, high = (median if end is None else end for end in (low, high))
    return {"median": median, "p10": low, "p90": high, "low": low, "high": high}


def stack_result(speedup: dict[str, float]) -> dict:
    """A result with one benchmark, of the two-layer stack."""
    peer, ours = "torch eager NCHW conv-pool-relu", "pyconv channels_last"
    entry = {"layout": "", "threads": 1, "seconds": summary(1e-3)}
    info = {
        "kind": "stack",
        "device": "cpu",
        "ours": ours,
        "best_peer": peer,
        "rounds": 7,
        "calls_per_round": 1,
        "implementations": {
            ours: {"role": "ours", "speedup_over_best_peer": speedup, **entry},
            peer: {"role": "peer", "ratio_to_ours": speedup, **entry},
        },
    }
    machine = dict.fromkeys(("cpu", "architecture", "system", "python", "torch", "torch_cpu_capability"), "x")
    return {
        "format_version": results.FORMAT_VERSION,
        "suite": "quick",
        "device": "cpu",
        "load_before": 0.0,
        "datetime": "2020-01-01",
        "version": "5",
        "commit_info": {},
        "machine_info": {**machine, "cores": 2, "packages": {}, "pyconv": None},
        "benchmarks": [
            {"name": "test_stack", "fullname": "f", "stats": {"median": 1e-3}, "extra_info": info}
        ],
    }


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


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_suites_name_existing_shapes_and_no_cell_twice(suite) -> None:
    names = {case.name for case in CASES}
    assert {cell.shape for cell in suite.cells} | {*suite.memory_shapes, *suite.scaling_shapes} <= names
    assert len({cell.id() for cell in suite.cells}) == len(suite.cells)


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


def test_report_marks_a_loss() -> None:
    won = report_terminal.format_result(stack_result(summary(5.0)))
    lost = report_terminal.format_result(stack_result(summary(0.9)))
    assert not any(line.startswith("!   ") for line in won.splitlines())
    assert any(line.startswith("!   0.90x") for line in lost.splitlines())
