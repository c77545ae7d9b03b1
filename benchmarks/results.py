"""The result file of schema.json: pytest-benchmark's JSON without raw rounds or what names a machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.journal import Progress

SCHEMA_PATH = Path(__file__).resolve().parent / "schema.json"
FORMAT_VERSION = 1

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


class ResultError(ValueError):
    """A result file that cannot be read or does not follow the schema."""


def assemble(progress: Progress, suite: str, device: str, load_before: float) -> dict[str, Any]:
    """The result that a journal's content makes.

    Args:
        load_before: runnable processes of the machine, averaged over the minute before the run.
    """
    for benchmark in progress.benchmarks:
        info = benchmark["extra_info"]
        if "peaks" not in info or "min_bytes" not in info:
            continue
        for entry in info["implementations"].values():
            entry |= efficiency(info, entry["seconds"]["median"])
            if "flushed_l2" in entry:
                entry["flushed_l2"] |= efficiency(info, entry["flushed_l2"]["seconds"]["median"])
    return {
        "format_version": FORMAT_VERSION,
        "suite": suite,
        "device": device,
        "load_before": round(load_before, 2),
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": importlib.metadata.version("pytest-benchmark"),
        "commit_info": {},
        "machine_info": progress.machine_info,
        "benchmarks": progress.benchmarks,
        "not_measured": progress.not_measured,
    }


def efficiency(info: dict[str, Any], seconds: float) -> dict[str, float]:
    """GFLOP/s, and the fractions of the FMA peak and of the roofline that a time of `seconds` reaches.

    The roofline's time is the longer of the arithmetic at peak and the least traffic at copy bandwidth. FLOPs
    are dense-equivalent, so a backward that skips the zeros of max-pooling's gradient may pass 1. Work without FLOPs
    has the last fraction only.
    """
    peaks = info["peaks"]
    arithmetic = info.get("flops", 0) / (peaks["gflops"] * 1e9)
    traffic = info["min_bytes"] / (peaks["copy_gb_per_second"] * 1e9)
    figures = {"fraction_of_roofline": max(arithmetic, traffic) / seconds}
    if "flops" in info:
        figures |= {"gflops": info["flops"] / seconds / 1e9, "fraction_of_peak": arithmetic / seconds}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def load(path: str | Path) -> dict[str, Any]:
    """Read and validate a result file; ResultError names the file and what is wrong in it."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # of the encoding, too
        raise ResultError(f"{path}: expected JSON, but {error}") from None
    faults = list(validate(result))
    if faults:
        raise ResultError(f"{path} does not follow the schema of benchmark results: {'; '.join(faults[:5])}")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def save(result: dict[str, Any], path: str | Path) -> None:
    """Write a result file with one benchmark per line, a fifth of the indented size."""
    head = {key: value for key, value in result.items() if key != "benchmarks"}
    rows = ",\n".join(json.dumps(benchmark, sort_keys=True) for benchmark in result["benchmarks"])
    text = json.dumps(head, indent=1, sort_keys=True).removesuffix("\n}")
    Path(path).write_text(f'{text},\n "benchmarks": [\n{rows}\n]}}\n', encoding="utf-8")


def validate(result: Any) -> Iterator[str]:
    """The places in `result` that break schema.json, as sentences; none if it is valid."""
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    faults = list(_faults(result, schema, schema, "$"))
    yield from faults
    if not faults:
        yield from _wrong_names(result)


def _wrong_names(result: dict[str, Any]) -> Iterator[str]:
    """Where "ours" or "best_peer" names no implementation."""
    for index, benchmark in enumerate(result["benchmarks"]):
        info = benchmark["extra_info"]
        if "implementations" not in info:
            continue
        named = [("ours", info.get("ours"))]
        named += [("best_peer", info["best_peer"])] if info.get("best_peer") is not None else []
        for key, name in named:
            if name not in info["implementations"]:
                yield f"$.benchmarks[{index}].extra_info.{key} is {name!r}, which is no implementation"


def _faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str) -> Iterator[str]:
    """Where `value` breaks `schema`, for the part of JSON Schema that schema.json uses.

    That is: type, const, enum, exclusiveMinimum, required, properties, additionalProperties, items, and references
    into $defs.
    """
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "const" in schema and value != schema["const"]:
        yield f"{where} is {value!r}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where} is {value!r}, expected one of {schema['enum']}"
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is_of_type(value, name) for name in names):
            yield f"{where} is of type {type(value).__name__}, expected {' or '.join(names)}"
            return
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{where} is {value}, expected more than {schema['exclusiveMinimum']}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key in schema.get("required", []):
            if key not in value:
                yield f"{where} lacks {key!r}"
        rest = schema.get("additionalProperties", True)
        for key, entry in value.items():
            if key in properties:
                yield from _faults(entry, properties[key], root, f"{where}.{key}")
            elif rest is False:
                yield f"{where} has an unexpected {key!r}"
            elif isinstance(rest, dict):
                yield from _faults(entry, rest, root, f"{where}.{key}")
    if isinstance(value, list) and "items" in schema:
        for index, entry in enumerate(value):
            yield from _faults(entry, schema["items"], root, f"{where}[{index}]")


def _is_of_type(value: Any, name: str) -> bool:
    # Python counts True as an int; JSON does not.
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])
