"""The result of `decode.bench` as tables on a terminal."""

from typing import Any

from decode.bench_measure import QUIET


def show(result: dict[str, Any]) -> None:
    machine = result["machine"]
    clock = ", the processor's seconds" if result["clock"] == "cpu" else ""
    print(f"{result['device']}, {result['threads']} threads, {result['capability']}{clock}")
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    products = ", ".join(f"{name} {speed:,.0f} GFLOP/s" for name, speed in machine["matmul_gigaflops"].items())
    print(f"reads {machine['read_gigabytes_per_second']} GB/s, products {products}")
    if result["rows"]:
        print("\ndecoding steps only; ratio: to transformers' fastest dtype in this run")
        _steps(result["rows"])
    for count, batch, ours, peer, third in thirds(result["rows"]):
        print(
            f"  B={batch:<3} {count} members {ours:8.1f} tok/s, {peer}'s single model over {count}: {third:8.1f}: "
            f"{ours / third:.2f} times"
        )
    _times(result["rows"])
    for section, title in (("member_sweep", "members"), ("context_sweep", "positions in the cache")):
        if result.get(section):
            print(f"\n{title}")
            _steps(result[section])
    for section, title in (("sentence_sweep", "sentences"), ("dev", "whole set"), ("speculation", "speculation")):
        if result.get(section):
            print(f"\n{title}")
            _texts(result[section])
    for note in result["notes"]:
        print(f"not measured: {note}")


def thirds(rows: list[dict[str, Any]]) -> list[tuple[int, int, float, str, float]]:
    """(members, batch, our tokens/s, best peer, its tokens/s over the members): no peer sums several models."""
    found = []
    peers = [row for row in rows if row["members"] == 1 and row["system"] in ("ctranslate2", "openvino")]
    for row in rows:
        if row["system"] != "ours" or row["members"] == 1:
            continue
        same = [peer for peer in peers if (peer["batch"], peer["dtype"]) == (row["batch"], row["dtype"])]
        if same:
            best = max(same, key=lambda peer: peer["tokens_per_second"])
            third = best["tokens_per_second"] / row["members"]
            found.append((row["members"], row["batch"], row["tokens_per_second"], best["system"], third))
    return found


def _steps(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"  B={row['batch']:<3} {row['members']} members, context {row['context']:<6g} "
            f"{row['system']:13}{row['dtype']:9}{row['tokens_per_second']:9.1f} tok/s {row['ms_per_step']:9.2f} ms "
            f"{_ratio(row['ratio_to_transformers'])}, {row['share_of_read_bandwidth']:4.0%} of reads, "
            f"{row['share_of_arithmetic']:4.0%} of products, {row['peak_memory_megabytes']:,.0f} MB, "
            f"{_tokens(row)}{_stolen(row)}"
        )


def _times(rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if "time" in row]
    if timed:
        print("\nwhere the time of a step goes")
    for row in timed:
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["time"]["shares"].items())
        print(f"  B={row['batch']:<3} {row['members']} members {row['dtype']:9} {shares}")


def _texts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        setting = f"speculate {row['speculate']}" if "speculate" in row else row.get("order", "")
        ratio = row.get("ratio_to_plain", row["ratio_to_transformers"])
        score = f", BLEU {row['bleu']:.2f}" if "bleu" in row else ""
        print(
            f"  {row['sentences']:>6} sentences, B={row['batch']:<3} {row['combine']:22} {row['system']:13}"
            f"{row['dtype']:9}{setting:14}{row['seconds']:8.2f} s {row['tokens_per_second']:8.0f} tok/s "
            f"{_ratio(ratio)}, {_tokens(row)}{score}{_stolen(row)}"
        )
        if row.get("acceptance"):
            kept = ", ".join(f"{name} {share:.0%}" for name, share in row["acceptance"].items())
            computed = row.get("ratio_computed_for_a_gpu")
            gpu = "" if computed is None else f"; computed from bytes, for a GPU: {computed:.2f}x"
            print(f"         {row['steps']} steps, drafts kept: {kept}{gpu}")


def _ratio(ratio: float | None) -> str:
    return "   -  " if ratio is None else f"{ratio:5.2f}x"


def _stolen(row: dict[str, Any]) -> str:
    """How much of the worst round a virtual machine's neighbours took, where that is worth a word."""
    share = max(row["stolen_of_rounds"], default=0.0)
    return f", {share:.0%} of a round stolen" if share > QUIET else ""


def _tokens(row: dict[str, Any]) -> str:
    """How many are the same, and every difference that is no tie with its margin."""
    if row["tokens_equal"] is None:
        return "tokens not compared"
    if row["tokens_equal"]:
        return f"{row['sequences']} of {row['sequences']} equal"
    shown = []
    for difference in row["differences"]:
        if "margin" in difference:
            kind = "tie" if difference["tie"] else "no tie"
            margin = f"margin {difference['margin']:.1e}, {kind} within {difference['tolerance']:.0e}"
        elif None in (difference["reference_token"], difference["token"]):
            margin = "one is longer"
        else:
            margin = "another storage, not judged"
        shown.append(f"{difference['sentence']}:{difference['position']} {margin}")
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"{row['sequences_equal']} of {row['sequences']} equal, {row['ties']} ties ({'; '.join(shown[:5])}{more})"
