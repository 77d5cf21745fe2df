"""Write the tables of docs/gpu.md from the result files: what the kernels compile to, and what a GPU measured if one did.

python benchmarks/gpu_tables.py
"""

import argparse
from pathlib import Path

from loki_attention.results import Result, SavedResults, load_results
from table_parts import between, markdown, write

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- made by benchmarks/gpu_tables.py -->\n", "<!-- end -->\n"
UNTIMED = "**Nothing has been timed on a GPU yet.** No figure on this page is a time.\n"


def main() -> None:
    """Read the result files and write what stands between the markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that benchmarks/gpu.py wrote into")
    folder = parser.parse_args().results
    parts = [compiled_table(load_results(RESULTS / "triton-compiled.json"))]
    files = {name: folder / f"gpu-{name}.json" for name in ("hardware", "attention", "generate")}
    timed = {name: load_results(path) for name, path in files.items() if path.is_file()}
    found = [hardware_table(timed["hardware"])] if "hardware" in timed else []
    if "attention" in timed:
        found.append(attention_table(timed["attention"], bandwidth(timed.get("hardware"))))
    if "generate" in timed:
        found.append(generate_table(timed["generate"]))
    content = "\n".join([*([] if found else [UNTIMED]), *found, *parts])
    write(PAGE, between(PAGE.read_text(encoding="utf-8"), BEGIN, END, content))


def compiled_table(file: SavedResults) -> str:
    """Registers and instructions a token of every kernel, by architecture."""
    rows: dict[str, dict[int, Result]] = {}
    for one in file.results:
        rows.setdefault(str(one.config["kernel"]), {})[int(one.config["architecture"] or 0)] = one
    body = []
    for kernel, found in rows.items():
        per_token = all(one.metric == "instructions_per_token" for one in found.values())
        counts = [f"{one.value:.1f}" if per_token else "-" for one in found.values()]
        budget = next(iter(found.values())).config["budget"]
        registers = " / ".join(str(one.config["registers"]) for one in found.values())
        spilled = sum(int(one.config["spilled_bytes"] or 0) for one in found.values())
        shared = found[90].config["shared_bytes"]
        body.append([kernel, *counts, "-" if budget is None else f"{budget:g}", registers, str(spilled), str(shared)])
    head = ["kernel", "sm_80", "sm_90", "sm_100", "budget", "registers", "bytes spilled", "bytes of shared memory"]
    version = file.results[0].config["triton"]
    text = f"Warp instructions a token by architecture, compiled by Triton {version}; registers in the same order.\n"
    return "\n".join([text, markdown(head, body), made_by(file)])


def hardware_table(file: SavedResults) -> str:
    """What the chip can do."""
    body = []
    for one in file.results:
        rate = one.config["bytes_a_second"]
        body.append(
            [
                str(one.config["question"]),
                f"{1e6 * one.value:.2f}",
                "-" if rate is None else f"{float(rate) / 1e12:.2f}",
            ]
        )
    return "\n".join(["## The chip\n", markdown(["question", "µs a call", "TB/s"], body), made_by(file)])


def bandwidth(file: SavedResults | None) -> float | None:
    """Bytes a second that a copy moved, None where that was not measured."""
    probes = file.results if file else ()
    return next(
        (float(one.config["bytes_a_second"] or 0) for one in probes if one.config["question"] == "M1 copy"), None
    )


def attention_table(file: SavedResults, bytes_a_second: float | None) -> str:
    """Every provider of every case; its share of the byte ideal is the time its bytes take at M1's rate over its own."""
    head = [
        "heads, batch, tokens",
        "provider",
        "planes, fraction",
        "µs (20 to 80 %)",
        "over the best dense",
        "byte ideal",
        "share of the ideal",
        "kept mass",
    ]
    body = []
    for one in file.results:
        config = one.config
        case = f"{config['heads']}, {config['batch']}, {config['tokens']:,}"
        spread = (
            f"{1e6 * one.value:.1f} ({1e6 * float(config['p20'] or 0):.1f} to {1e6 * float(config['p80'] or 0):.1f})"
        )
        setting = " ".join(str(config[name]) for name in ("planes", "fraction") if config.get(name))
        share = one.read_bytes / bytes_a_second / one.value if one.read_bytes and bytes_a_second else None
        figures = [
            number(config["over_best_dense"], "x"),
            number(config["byte_ideal"], "x"),
            f"{100 * share:.0f} %" if share else "-",
            number(config["kept_mass"], ""),
        ]
        body.append([case, str(config["provider"]), setting, spread, *figures])
    return "\n".join(["## One layer's decode step\n", markdown(head, body), made_by(file)])


def generate_table(file: SavedResults) -> str:
    """Tokens a second of whole generation."""
    head = ["batch, cached tokens", "variant", "backend", "tokens/s"]
    body = []
    for one in file.results:
        config = one.config
        case = f"{config['batch']}, {config['tokens']:,}"
        body.append([case, str(config["variant"]), str(config["backend"] or ""), f"{one.value:.1f}"])
    return "\n".join(["## Whole generation\n", markdown(head, body), made_by(file)])


def number(value: object, unit: str) -> str:
    """A figure with two digits, a dash where there is none."""
    return f"{value:.2f}{unit}" if isinstance(value, float) else "-"


def made_by(file: SavedResults) -> str:
    """The command, machine and commit of a file."""
    environment = file.environment
    return (
        f"`{environment.command}`, {environment.hardware}, commit {environment.commit[:12]}, {environment.date[:10]}.\n"
    )


if __name__ == "__main__":
    main()
