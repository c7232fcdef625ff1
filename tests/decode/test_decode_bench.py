"""The bench runs from end to end on tiny models, and what it says of tokens is true. Speeds are not looked at."""

import json

import pytest
import torch
from tiny import tiny_model

from decode import bench, bench_measure
from decode.bench_measure import FLOAT32_ROUNDING, ROUNDINGS, Bench, Samples, System, compare
from decode.bench_plot import plot
from decode.bench_profile import part_of
from decode.bench_sections import ratio_by_bytes
from decode.bench_shapes import SHAPES, Models, random_folder, step_work
from decode.bench_systems import STOP, Ours, Transformers
from minillama import InputError, Llama

ROW = {
    "system",
    "batch",
    "members",
    "dtype",
    "tokens_per_second",
    "ms_per_step",
    "ratio_to_transformers",
    "tokens_equal",
    "peak_memory_megabytes",
    "stolen_of_rounds",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    work = tmp_path_factory.mktemp("bench")
    folders = {name: str(random_folder("tiny", seed, work)) for seed, name in enumerate(("A", "B"))}
    return Models("tiny", folders, "A - 0.5*B", random=True)


def prompts_of(models, *lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    rows = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in lengths]
    return dict.fromkeys(models.folders, rows)


def test_a_quick_run_gives_one_row_a_system_and_the_same_tokens(tmp_path, capsys):
    arguments = ["--quick", "--threads", "1", "--members", "2", "--systems", "ours,transformers", "--no-profile"]
    assert bench.main([*arguments, "--json", "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["system"], row["batch"]) for row in result["rows"]] == [
        ("ours", 1),
        ("transformers", 1),
        ("ours", 2),
        ("transformers", 2),
    ]
    for row in result["rows"]:
        assert row.keys() >= ROW
        assert (row["members"], row["dtype"], row["tokens_equal"]) == (2, "float32", True)
        assert row["sequences"] == row["sequences_equal"] == row["batch"]
        assert row["peak_memory_megabytes"] > 50
    assert result["machine"]["read_gigabytes_per_second"] > 0
    assert {"date", "device", "threads", "versions", "arguments"} <= result.keys()
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text()) == result
    pictures = plot(tmp_path)
    assert [picture.read_bytes()[:4] for picture in pictures] == [b"\x89PNG"]


def test_static_batches_with_left_padding_end_and_choose_as_continuous_ones(models):
    stops = list(range(7, 400, 40))
    prompts = prompts_of(models, 3, 17, 8, 30, 5)
    ours = Ours(models.folders, models.combine, "float32", "cpu", stops).generate(prompts, 40, 2, ignore_eos=False)
    reference = Transformers(models.folders, models.combine, "float32", "cpu", stops)
    for longest_first in (False, True):
        theirs = reference.generate(prompts, 40, 3, ignore_eos=False, longest_first=longest_first)
        assert theirs["tokens"] == ours["tokens"]
    assert any(row[-1] == STOP for row in ours["tokens"])
    assert len({len(row) for row in ours["tokens"]}) > 2


def test_margins_are_those_of_the_models_logits_in_float64(models):
    reference = Transformers(models.folders, models.combine, "float32", "cpu", [7, 47])
    prompts = {"A": [5, 6, 7], "B": [9]}
    case = {"prompts": prompts, "prefix": [11, 12], "first": 30, "second": STOP}
    (found,) = reference.margins([case])
    weights = {"A": 1.0, "B": -0.5}
    with torch.no_grad():
        x_V = sum(
            weight
            * Llama.from_pretrained(models.folders[name]).double()(torch.tensor([prompts[name] + [11, 12]]))[0, -1]
            for name, weight in weights.items()
        )
    assert found["margin"] == pytest.approx(float(x_V[30] - torch.maximum(x_V[7], x_V[47])), abs=1e-4)


def test_every_difference_is_listed_and_only_a_near_one_is_a_tie(models, tmp_path):
    prompts = prompts_of(models, 6, 9, 4)
    reference = System("transformers", "float32")
    expected = Ours(models.folders, models.combine, "float32", "cpu").generate(prompts, 5, 3)["tokens"]
    changed = [row[:] for row in expected]
    changed[1][3] = next(token for token in range(3, 400) if token != expected[1][3])
    run = Bench(threads=1, rounds=1, device="cpu", work=tmp_path, turns="auto")
    same = compare(run, models, prompts, reference, expected, expected)
    assert (same["tokens_equal"], same["sequences_equal"], same["differences"]) == (True, 3, [])
    found = compare(run, models, prompts, reference, expected, changed)
    assert (found["tokens_equal"], found["sequences_equal"], found["ties"]) == (False, 2, 0)
    (difference,) = found["differences"]
    assert (difference["sentence"], difference["position"]) == (1, 3)
    assert difference["margin"] > difference["tolerance"] > ROUNDINGS * FLOAT32_ROUNDING
    assert (difference["reference_token"], difference["token"]) == (expected[1][3], changed[1][3])


def test_a_measurement_that_neighbours_disturbed_is_repeated_and_the_quietest_kept(tmp_path, monkeypatch):
    taken = iter([30, 10, 20, 0, 50])
    clock = {"worked": 0, "stolen": 0}
    monkeypatch.setattr(bench_measure, "processor_ticks", lambda: (clock["worked"], clock["stolen"]))
    seen = []

    def measure():
        stolen = next(taken)
        clock["worked"] += 100 - stolen
        clock["stolen"] += stolen
        seen.append(stolen)
        return stolen

    run = Bench(threads=1, rounds=1, device="cpu", work=tmp_path, turns="auto", patience=2)
    assert run.quietly(measure) == (10, 0.1)
    assert run.quietly(measure) == (0, 0.0)
    assert seen == [30, 10, 20, 0]
    run.patience = 0
    assert run.quietly(measure) == (50, 0.5)


def test_a_steps_time_is_the_median_of_those_that_decode_all_rows():
    samples = Samples()
    # 10 new tokens; the last row's prompt ends two steps behind the first one's, so the first row ends two steps early.
    ends = [5, 10, 15, 16, 17, 18, 20, 22, 25, 26, 90, 91]
    samples.add({"clock": ends, "tokens": [[1]]}, 10)
    assert samples.first_seconds == [15]
    assert samples.step_seconds == [[2, 2, 3, 1]]  # steps 7 to 10
    samples.add({"clock": [1, 2, 3, 4, 5, 6, 7, 27, 28, 29], "tokens": [[1]]}, 10)
    assert samples.step_seconds[1] == [1, 1, 1, 20, 1, 1]
    assert samples.seconds == 1
    with pytest.raises(InputError, match=r"--steps 2: .* give more"):
        samples.add({"clock": list(range(8)), "tokens": [[1]]}, 6)


def test_a_step_reads_every_weight_of_its_products_once():
    config = SHAPES["tiny"]
    model = tiny_model(0)
    products = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() == 2)
    read, work = step_work([config, config], "float32", batch=3, context=0)
    assert read == 2 * 4 * products
    assert work == 2 * 2 * 3 * products
    cached = step_work([config], "float32", 3, 10)[0] - step_work([config], "float32", 3, 0)[0]
    assert cached == 3 * 10 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


def test_a_gpus_figure_counts_the_weights_that_the_passes_of_a_lone_row_read(models):
    """By hand: two members of one size, 30 plain steps; 10 steps in which one drafts 2 and keeps both: 10 + 10/2*2."""
    assert ratio_by_bytes(models, 30, 10, {"drafters": {"A": (20, 20)}}) == 1.5
    assert ratio_by_bytes(models, 30, 10, {"drafters": {"lookup": (40, 20)}}) == 3.0
    assert ratio_by_bytes(models, 30, 30, {"drafters": {}}) == 1.0


def test_operations_are_counted_where_they_belong():
    assert part_of("mkldnn::_linear_pointwise", ["PackedLinear"]) == "matmul"
    assert part_of("aten::_scaled_dot_product_flash_attention_for_cpu", []) == "attention"
    assert part_of("aten::add_", ["aten::sum", "fused_logits"]) == "choose"
    assert part_of("aten::silu", []) == "norm and elementwise"


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="--clock cpu counts what one thread needs"):
        bench.main(["--clock", "cpu", "--threads", "2"])
    with pytest.raises(InputError, match="--systems vllm"):
        bench.main(["--systems", "vllm"])
    with pytest.raises(InputError, match="no results to draw"):
        bench.main(["--plot", "--output", str(tmp_path)])
