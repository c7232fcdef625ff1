"""`python -m decode.tune` and `decode.collab --weights` as used: files in, files out, one line for each error."""

import json
import math
import tomllib

import pytest

from corpora import sample
from decode.collab import main as collab
from decode.pipeline.weights_file import read_weights
from decode.score import main as score
from decode.tune import main
from minillama.errors import exit_code

PAIRS = sample()
COUNT = 20


@pytest.fixture
def texts(tmp_path):
    """Pairs to fit on with a blank line among them, and others."""
    for name, first in (("fit", 0), ("other", COUNT)):
        for side, lines in (("ja", PAIRS.source), ("en", PAIRS.target)):
            kept = [*lines[first : first + 5], "", *lines[first + 5 : first + COUNT]]
            (tmp_path / f"{name}.{side}").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return tmp_path


def models_of(folders, names="ABC"):
    return [*(part for name in names for part in ("--model", f"{name}={folders[name]}")), "--prompt", "plain"]


def arguments(folders, texts, *extra, names="ABC"):
    files = ["--input", str(texts / "fit.ja"), "--reference", str(texts / "fit.en")]
    languages = ["--source", "ja", "--target", "en"]
    return [*models_of(folders, names), *languages, *files, "--batch-size", "8", *extra]


def test_the_file_has_weights_and_certificate_and_decode_collab_reads_it(model_folders, texts, capsys):
    out = texts / "weights.toml"
    assert main(arguments(model_folders, texts, "--output", str(out))) == 0
    printed = capsys.readouterr().out
    found = tomllib.loads(out.read_text(encoding="utf-8"))
    assert list(found["weights"]) == list("ABC")
    assert f'--combine "{found["combine"]}"' in printed
    assert found["fit"]["texts"] == COUNT
    assert found["texts"]["blank"] == 1
    assert found["fit"]["gradient_norm"] < 1e-5
    assert found["fit"]["smallest_eigenvalue"] > 0
    assert all(error > 0 for error in found["standard_errors"].values())
    assert found["fit"]["nats"] < min(found["against"].values())
    assert list(found["against"]) == ["A + B + C", "A + 0.5*B + 0.5*C", "A", "B", "C"]
    for expression in found["against"]:
        assert expression in printed

    common = ["--source", "ja", "--target", "en", "--input", str(texts / "other.ja"), "--max-new-tokens", "12"]
    written = []
    for option in (["--weights", str(out)], ["--combine", found["combine"]]):
        files = [str(texts / f"{option[0][2:]}.{kind}") for kind in ("txt", "json")]
        run = [*models_of(model_folders), *common, *option, "--output", files[0], "--report", files[1]]
        assert collab(run) == 0
        report = json.loads((texts / f"{option[0][2:]}.json").read_text())
        assert report["weights"] == found["weights"]
        assert report["combine"] == found["combine"]
        written.append((texts / f"{option[0][2:]}.txt").read_bytes())
    assert written[0] == written[1]


def test_decode_score_has_the_likelihood_that_was_fitted(model_folders, texts, capsys):
    out = texts / "weights.toml"
    main(arguments(model_folders, texts, "--output", str(out)))
    fit = tomllib.loads(out.read_text(encoding="utf-8"))["fit"]
    files = [
        "--input",
        str(texts / "fit.ja"),
        "--translation",
        str(texts / "fit.en"),
        "--output",
        str(texts / "scores"),
    ]
    assert score([*models_of(model_folders), "--source", "ja", "--target", "en", *files, "--weights", str(out)]) == 0
    rows = [line.split("\t") for line in (texts / "scores").read_text().splitlines()[1:]]
    rows = [row for row in rows if row[1] != "0"]
    assert sum(int(row[1]) for row in rows) == fit["tokens"]
    assert -sum(float(row[2]) for row in rows) / fit["tokens"] == pytest.approx(fit["nats"], abs=1e-4)


def test_json_has_everything_and_runs_repeat_to_the_bit(model_folders, texts, capsys):
    extra = ["--held-out", str(texts / "other.ja"), str(texts / "other.en"), "--json"]
    extra += ["--against", "A", "--against", "B - 0.5*C", "--l2", "0.01"]
    reports = []
    for _ in range(2):
        assert main(arguments(model_folders, texts, *extra)) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for report in reports:
        del report["fit"]["seconds"], report["fit"]["read_seconds"]
    assert reports[0] == reports[1]
    report = reports[0]
    assert [row["expression"] for row in report["against"]] == ["A", "B - 0.5*C"]
    assert report["against"][0]["held_out_gain"] == pytest.approx(
        report["against"][0]["held_out_nats"] - report["held_out"]["nats"]
    )
    assert report["temperature"]["nats"] >= report["fit"]["nats"]
    assert report["fit"]["l2"] == 0.01


def test_a_weight_at_its_bound_of_zero_leaves_the_sum(model_folders, texts, capsys):
    out = texts / "weights.toml"
    assert main(arguments(model_folders, texts, "--output", str(out), "--bounds", "0,0.05")) == 0
    found = tomllib.loads(out.read_text(encoding="utf-8"))
    assert all(0 <= weight <= 0.05 for weight in found["weights"].values())
    assert found["fit"]["at_bounds"]
    zero = [name for name, weight in found["weights"].items() if weight == 0]
    assert read_weights(str(out), list("ABC")).keys() == set("ABC") - set(zero)
    for name in found["fit"]["at_bounds"]:
        assert math.isnan(found["standard_errors"][name])
    assert "at its bound" in capsys.readouterr().out


def test_two_models_of_one_folder_are_a_null_direction(model_folders, texts, capsys):
    twice = {"A": model_folders["A"], "B": model_folders["A"], "C": model_folders["C"]}
    assert main(arguments(twice, texts)) == 0
    assert "singular along A - B" in capsys.readouterr().out.replace("-A + B", "A - B")


def test_one_model_gets_its_temperature(model_folders, texts, capsys):
    assert main(arguments(model_folders, texts, "--json", names="A")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weights"]["A"] == pytest.approx(report["temperature"]["scale"], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "extra", "named"),
    [
        (lambda t: (t / "fit.en").write_text("one\n"), (), "fit.en has 1; they must be line-aligned"),
        (lambda t: [(t / f"fit.{side}").write_text("\n\n") for side in ("ja", "en")], (), "fit.ja: no pairs to fit on"),
        (lambda t: (t / "fit.en").unlink(), (), "fit.en: no such file"),
        (lambda t: (t / "fit.en").write_text("dog " * 200 + "\n" + "x\n" * COUNT), (), "fit.en:1: prompt and trans"),
        (lambda t: None, ("--combine", "A + B"), "C is given as a model but not used"),
        (lambda t: None, ("--combine", "A*B*C"), "multiplied by"),
        (lambda t: None, ("--against", "A + D"), "D is unknown"),
        (lambda t: None, ("--l2", "-1"), "--l2 -1"),
        (lambda t: None, ("--l2", "nan"), "--l2 nan"),
        (lambda t: None, ("--bounds", "1,0"), "--bounds 1,0"),
        (lambda t: None, ("--bounds", "1"), "--bounds 1"),
        (lambda t: None, ("--bounds", "nan,1"), "--bounds nan,1"),
        (lambda t: None, ("--batch-size", "0"), "--batch-size 0"),
        (lambda t: None, ("--objective", "bleu"), "unknown argument --objective"),
        (lambda t: None, ("--output", "-"), "standard output is for figures"),
        (lambda t: None, ("--output", "/no/such/folder/w.toml"), "cannot be written"),
        (lambda t: None, ("--input", "-", "--reference", "-"), "standard input is given more than once"),
        (lambda t: None, ("--source", "xx"), "xx"),
        (lambda t: None, ("--weights", "/no/file.toml"), "/no/file.toml"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(model_folders, texts, capsys, change, extra, named):
    change(texts)
    out = texts / "weights.toml"
    code = exit_code(lambda: main(arguments(model_folders, texts, "--output", str(out), *extra)))
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2
    assert error.startswith("error: ")
    assert named in error
    assert not out.exists()


def test_pairs_that_are_too_long_can_be_skipped(model_folders, texts, capsys):
    lines = (texts / "fit.en").read_text(encoding="utf-8").split("\n")
    (texts / "fit.en").write_text("\n".join(["dog " * 200, *lines[1:]]), encoding="utf-8")
    assert main(arguments(model_folders, texts, "--json", "--too-long", "skip")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["texts"]["skipped_lines"] == [1]
    assert report["fit"]["texts"] == COUNT - 1


def test_combine_and_weights_exclude_one_another(model_folders, texts, tmp_path, capsys):
    (tmp_path / "w.toml").write_text("[weights]\nA = 0.5\nB = 1\nC = 1\n")
    both = ["--weights", str(tmp_path / "w.toml"), "--combine", "A + B + C"]
    for command, given in ((main, "--reference"), (collab, "--reference"), (score, "--translation")):
        files = ["--input", str(texts / "fit.ja"), given, str(texts / "fit.en")]
        argv = [*models_of(model_folders), "--source", "ja", "--target", "en", *files, *both]
        assert exit_code(lambda command=command, argv=argv: command(argv)) == 2
        assert "--combine and --weights exclude one another" in capsys.readouterr().err
