"""tools/train_embedded.py on the CPU, tiny: the corpus rules, the measures, and the whole path from text to checkpoint.

Run: pytest tests/null/test_train_embedded.py
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the training tool needs torch: pip install torch")
pytest.importorskip("transformers", reason="the training tool checks its export with it: pip install transformers")

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # where `python tools/train_embedded.py` finds its own parts

from embedded import corpus, evaluation, export, tokenizer, training  # noqa: E402
from embedded.model import LlamaModel, ModelConfig  # noqa: E402

TINY = ModelConfig(vocab=320, hidden=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate=64, max_positions=32)


def source(path: str, text: str) -> corpus.SourceFile:
    return corpus.SourceFile(path, text)


def function_text(name: str) -> str:
    return "".join(f"def {name}_{i}(value):\n    return {name} + value * {i}\n\n\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (function_text("alpha"), None),
        ("x = 1\n", "size"),
        ("TABLE = [\n" + "    12, 345, 678, 90, 21, 33, 47,\n" * 40 + "]\n", "few letters"),
        ("TABLE = (\n" + "    '\\x41\\u0391',  # LETTER WITH A LONG NAME\n" * 40 + ")\n", "escapes"),
        ("names = [" + "'somebody', " * 60 + "]\n", "long lines"),
        ("# " + "\n# ".join(["\u043f\u0440\u0438\u0432\u0435\u0442"] * 60) + "\n", "not ASCII"),
    ],
)
def test_data_written_as_code_is_left_out(text: str, reason: str | None) -> None:
    assert corpus.data_reason("m.py", text) == reason


def test_a_copy_of_a_file_is_dropped_and_its_like_is_kept() -> None:
    original, other = source("a.py", function_text("alpha")), source("c.py", function_text("gamma"))
    copy = source("b.py", "# a comment of its own\n" + function_text("alpha"))
    assert corpus.drop_repeats([copy, other, original]) == [original, other]


def test_split_of_a_file_does_not_depend_on_the_others() -> None:
    files = [source(f"m{i}.py", "pass") for i in range(400)]
    whole, part = corpus.split_files(files, 20), corpus.split_files(files[::2], 20)
    for name in whole:
        assert set(part[name]) == set(whole[name]) & set(files[::2])
    assert sum(map(len, whole.values())) == 400
    assert 8 <= len(whole["held_out"]) <= 36
    assert corpus.split_files(files, 21)["held_out"] != whole["held_out"]


def test_packed_corpus_reads_back_equal(tmp_path: Path) -> None:
    files = [source(f"p/m{i}.py", function_text(f"name{i}")) for i in range(25)]
    packed = corpus.Corpus("some text", "3.11.7", corpus.LICENCE, sorted(files, key=lambda f: f.path))
    corpus.pack_corpus(packed, tmp_path / "c.tar.gz")
    assert corpus.read_corpus(tmp_path / "c.tar.gz") == packed


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 usable"):
        corpus.read_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor an archive"):
        corpus.read_corpus(tmp_path / "missing")


def test_tokenizer_is_lossless_on_any_text() -> None:
    bpe = tokenizer.train_tokenizer([source("m.py", __doc__ + function_text("alpha"))], 320)
    strange = source("s.py", "\tif x:\r\n  y = '\u00e9\u4e2d\U0001f600'   \n\n\n        # <|endo ftext|>\n")
    (document,) = tokenizer.encode_files(bpe, [strange])
    joined = tokenizer.join_documents([document, document])
    assert bpe.decode(document.tolist()) == strange.text
    ends = [i for i, token in enumerate(joined) if token == tokenizer.END_OF_TEXT_ID]
    assert ends == [0, len(document) + 1, 2 * len(document) + 2]


def test_learning_rate_rises_then_falls_to_its_floor() -> None:
    plan = training.TrainingPlan(peak_rate=1.0, final_rate_fraction=0.1, warmup_steps=10)
    rates = [training.learning_rate(plan, step, 200) for step in range(201)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[200] == pytest.approx(0.1)


def test_document_score_counts_every_token_once() -> None:
    """Against one forward pass a token, over the context that the half-window rule gives it."""
    torch.manual_seed(1)
    model = LlamaModel(TINY).eval()
    document = torch.randint(1, 320, (101,)).numpy()
    tokens = torch.tensor([tokenizer.END_OF_TEXT_ID, *document.tolist()])
    width, expected = TINY.max_positions, 0.0
    for i in range(1, len(tokens)):
        begin = 0 if i <= width else (i - width + width // 2 - 1) // (width // 2) * (width // 2)
        assert i - begin <= width
        with torch.no_grad():
            expected -= torch.log_softmax(model(tokens[None, begin:i])[0, -1], -1)[tokens[i]].item()
    assert evaluation.document_nats(model, document, torch.device("cpu")) == pytest.approx(expected, rel=1e-4)


def test_window_loss_is_the_mean_over_all_tokens() -> None:
    torch.manual_seed(2)
    model = LlamaModel(TINY).eval()
    tokens = torch.randint(0, 320, (16 * 3 + 6,))
    with torch.no_grad():
        parts = [model(tokens[None, b : min(b + 16, 53)])[0] for b in range(0, 53, 16)]
    expected = torch.nn.functional.cross_entropy(torch.cat(parts), tokens[1:]).item()
    assert evaluation.window_loss(model, tokens, 16) == pytest.approx(expected, rel=1e-5)


def test_an_export_that_disagrees_with_the_model_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = LlamaModel(dataclasses.replace(TINY, max_positions=128))
    export.round_to_bf16(model)
    bpe = tokenizer.train_tokenizer([source("m.py", __doc__ + function_text("alpha"))], 320)
    export.write_checkpoint(model, bpe, tmp_path)
    assert export.verify_checkpoint(model, bpe, tmp_path) <= export.MAX_LOGIT_ERROR
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="differ by"):
        export.verify_checkpoint(model, bpe, tmp_path)


torch.set_num_threads(1)  # the models here are tiny: threads would only contend with whatever else runs

QUICK = training.TrainingPlan(
    window_tokens=32, batch_windows=4, warmup_steps=5, num_validations=6, average_decay=0.9, compile=False
)
PATTERN = torch.arange(1, 41).repeat(60)  # learnable at once


def test_training_learns_and_returns_the_best_weights() -> None:
    torch.manual_seed(4)
    model = LlamaModel(TINY)
    result = training.train(model, PATTERN, PATTERN[:400], dataclasses.replace(QUICK, num_steps=120), lambda line: None)
    assert result.num_steps == 120
    assert len(result.curve) == 6
    assert result.validation_loss == pytest.approx(min(loss for _, loss in result.curve), abs=1e-4)
    assert result.validation_loss < 0.5 * math.log(40)
    assert evaluation.window_loss(model, PATTERN[:400], 32) == pytest.approx(result.validation_loss, abs=1e-4)


@pytest.mark.parametrize(
    ("later_step_s", "num_steps", "seconds", "words"),
    [(0.125, 48, 6.0, "125.0 ms a step"), (1.0, 27, 9.5, "stopped at step 27 of 48: 1.5 times 0.1 minutes are over")],
    ids=["as-calibrated", "slower-later"],
)
def test_training_fits_its_steps_into_the_time(
    monkeypatch: pytest.MonkeyPatch, later_step_s: float, num_steps: int, seconds: float, words: str
) -> None:
    """By a clock that each step moves on: 0.125 s while the calibration looks, later_step_s afterwards. 6 s are wanted."""
    now, lines, steps, rate_of_step = [100.0], [], [-1], training.learning_rate

    def next_step(plan: training.TrainingPlan, step: int, num_steps: int) -> float:
        if step > steps[-1]:  # asked for each group of parameters
            steps.append(step)
            now[0] += 0.125 if step < training.CALIBRATION_STEPS else later_step_s
        return rate_of_step(plan, step, num_steps)

    monkeypatch.setattr(training, "learning_rate", next_step)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    plan = dataclasses.replace(QUICK, minutes=0.1)
    result = training.train(LlamaModel(TINY), PATTERN, PATTERN[:400], plan, lines.append)
    assert (result.num_steps, result.seconds) == (num_steps, seconds)
    assert any(words in line for line in lines), lines


def test_averaged_weights_keep_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without no_grad around the average, every step would stay in memory for a backward pass that never comes."""
    seen = []

    def spy(averaged: LlamaModel, tokens: torch.Tensor, window_tokens: int) -> float:
        seen.extend(parameter.requires_grad for parameter in averaged.parameters())
        return 1.0

    monkeypatch.setattr(training, "window_loss", spy)
    training.train(LlamaModel(TINY), PATTERN, PATTERN[:400], dataclasses.replace(QUICK, num_steps=4), lambda line: None)
    assert seen
    assert not any(seen)


def test_bad_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 32"):
        ModelConfig(head_dim=32)
    with pytest.raises(ValueError, match="intermediate is 100"):
        ModelConfig(intermediate=100)


def test_smoke_run_learns_and_writes_a_checkpoint(tmp_path: Path) -> None:
    library, text = Path(sysconfig.get_path("stdlib")), tmp_path / "text"
    for path in [*library.glob("*.py"), *library.glob("json/*.py"), *library.glob("email/*.py")]:
        copied = text / path.relative_to(library)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    out = tmp_path / "model"
    command = [sys.executable, str(TOOLS / "train_embedded.py"), "--smoke", "--device", "cpu", "--steps", "30"]
    run = subprocess.run(
        [*command, "--corpus", str(text), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert {p.name for p in out.iterdir()} == {*export.CHECKPOINT_FILES, "training_report.json", "MODEL_CARD.md"}
    report = json.loads((out / "training_report.json").read_text())
    assert report["training"]["num_steps"] == 30
    # Better than the uniform guess, and than the random start, by a clear margin.
    assert report["training"]["validation_loss"] < math.log(512) - 0.7
    everything = report["held_out"]["all"]
    assert everything["perplexity_per_token"] == pytest.approx(math.exp(everything["loss_nats_per_token"]), rel=1e-3)
    assert everything["num_bytes"] == sum(score["num_bytes"] for score in report["held_out_files"])
    assert report["transformers_logit_error"] <= export.MAX_LOGIT_ERROR
