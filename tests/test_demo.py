"""The demo: text, training side by side, agreement, sampling, checkpoints, picture, errors."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastcell
from fastcell.cli import main
from fastcell.demo.agreement import check_curves, check_step, rounding
from fastcell.demo.checkpoint import load_checkpoint, save_checkpoint
from fastcell.demo.errors import UserError
from fastcell.demo.model import CharacterModel, ModelConfig
from fastcell.demo.sample import choose, sample
from fastcell.demo.text import default_text, encode, make_corpus, read_text, windows
from fastcell.demo.train import (
    Contender,
    TrainConfig,
    held_out_loss,
    make_training,
    train_side_by_side,
)

SMALL = ["--hidden", "24", "--batch", "4", "--window", "16", "--length", "60", "--quiet"]
LIBRARIES = ["torch", "fastcell"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prose(tmp_path):
    """A file with some real text."""
    path = tmp_path / "prose $x^{.txt"
    path.write_text(default_text()[:6000], encoding="utf-8")
    return str(path)


def tiny_model(cell="lstm", vocabulary=11, library="fastcell"):
    torch.manual_seed(3)
    return CharacterModel(library, ModelConfig(cell, 5, 7, 2), vocabulary)


def demo(*words):
    return main(["demo", *SMALL, *words])


# Text


def test_default_text_is_long_english_without_what_repeats():
    text = default_text()
    assert len(text) > 250_000
    assert text.count(" the ") > 2000
    paragraphs = [p for p in text.split("\n\n") if len(p.strip()) >= 60]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_read_text_drops_the_mark_and_foreign_line_ends(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(str(path)) == "one\ntwo\nthree\n"


def test_corpus_numbers_every_character_and_splits_without_loss():
    text = "zażółć 🦊 " * 40
    corpus = make_corpus("x", text, 2, 8)
    ids = torch.cat([corpus.train, corpus.held_out])
    assert "".join(corpus.vocabulary[i] for i in ids) == text
    assert list(corpus.vocabulary) == sorted(set(text))
    assert corpus.opening == text[-(len(text) // 20) :][:100]
    assert corpus.held_out.numel() == len(text) // 20
    assert encode("🦊ż", corpus.vocabulary).tolist() == [
        corpus.vocabulary.index("🦊"),
        corpus.vocabulary.index("ż"),
    ]


def test_of_a_long_text_no_more_is_held_out_than_is_quickly_evaluated():
    corpus = make_corpus("x", "abcde" * 300_000, 2, 8)
    assert (corpus.train.numel(), corpus.held_out.numel()) == (1_450_000, 50_000)


@pytest.mark.parametrize("extra", [0, 1])
def test_corpus_needs_one_window_for_each_track(extra):
    # 19 of 20 parts are trained on, and 18 windows of 1 need 19 characters.
    text = "ab" * 9 + "b" * (2 + extra)
    if extra:
        corpus = make_corpus("x", text, 2, 9)
        assert len(windows(corpus.train, 2, 9)) == 1
    else:
        with pytest.raises(UserError, match="too short"):
            make_corpus("x", text, 2, 9)


@pytest.mark.parametrize("keep_last", [False, True])
def test_windows_continue_their_tracks_and_targets_come_next(keep_last):
    ids = torch.arange(100, 142)
    pieces = windows(ids, 3, 4, keep_last=keep_last)
    track = 41 // 3  # 13: three windows of 4, and a rest of 1
    inputs = torch.cat([x for x, _ in pieces])
    assert [x.shape[0] for x, _ in pieces] == ([4, 4, 4, 1] if keep_last else [4, 4, 4])
    for b in range(3):
        start = 100 + b * track
        assert inputs[:, b].tolist() == list(range(start, start + inputs.shape[0]))
    for x, y in pieces:
        assert torch.equal(y, x + 1)
        assert x.is_contiguous()
        assert y.is_contiguous()


# Model and training


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_windows_with_carried_state_equal_one_long_window(cell, library):
    model = tiny_model(cell, library=library)
    ids = torch.randint(11, (12, 3))
    whole, _ = model(ids)
    first, state = model(ids[:5])
    second, _ = model(ids[5:], state)
    torch.testing.assert_close(
        torch.cat([first, second]), whole, rtol=rounding(12 * 14), atol=rounding(12 * 14)
    )
    without, _ = model(ids[5:])
    assert not torch.allclose(without, whole[5:], atol=1e-3)


def test_held_out_loss_is_the_mean_over_all_characters():
    model = tiny_model()
    ids = torch.randint(11, (38,))
    pieces = windows(ids, 1, 16, keep_last=True)
    assert [x.shape[0] for x, _ in pieces] == [16, 16, 5]
    whole, _ = model.loss(ids[:-1].view(-1, 1), ids[1:].view(-1, 1))
    assert held_out_loss(model, pieces) == pytest.approx(whole.item(), rel=1e-5)
    assert model.training


def train(cell="lstm", steps=45, seed=5):
    corpus = make_corpus("x", default_text()[:5000], 4, 16)
    config = TrainConfig(steps, 4, 16, 0.01, seed)
    training = make_training(ModelConfig(cell, 16, 24, 2), len(corpus.vocabulary), config)
    seen = []
    train_side_by_side(
        training,
        windows(corpus.train, 4, 16),
        windows(corpus.held_out, 4, 16, keep_last=True),
        lambda t: seen.append((len(t.torch.losses), len(t.fastcell.losses))),
    )
    return training, seen


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_both_libraries_learn_the_same(cell):
    training, seen = train(cell)
    theirs, ours = training.torch, training.fastcell
    assert type(theirs.model.recurrent).__module__.startswith("torch.")
    assert type(ours.model.recurrent) is getattr(fastcell, cell.upper())
    # From the same weights the first losses differ by rounding alone.
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=rounding(16 * 48))
    assert all(check.ok for check in training.checks)
    assert check_curves(theirs.losses, ours.losses).ok
    assert ours.losses[-1] < ours.losses[0] - 0.5
    assert ours.held_out[-1] < ours.held_out[0] - 0.5

    # Blocks of two steps in turn, torch first; every block but the cut one is timed.
    assert seen[:5] == [(1, 0), (2, 0), (2, 1), (2, 2), (3, 2)]
    assert len(ours.losses) == len(theirs.losses) == 45
    assert len(ours.block_seconds) == len(theirs.block_seconds) == 22
    assert len(training.rates(ours)) == 21
    assert training.rates(ours)[0] == pytest.approx(2 * 64 / ours.block_seconds[1])
    assert training.measured_at == [0, 10, 20, 30, 40, 45]
    assert len(training.checks) == len(ours.held_out) == 6

    state = ours.state if isinstance(ours.state, tuple) else (ours.state,)
    assert all(part.grad_fn is None and part.abs().sum() > 0 for part in state)


def test_state_is_carried_from_window_to_window_and_dropped_where_the_tracks_begin(monkeypatch):
    corpus = make_corpus("x", default_text()[:300], 4, 16)
    pieces = windows(corpus.train, 4, 16)
    assert len(pieces) == 4
    training = make_training(
        ModelConfig("lstm", 5, 7, 2), len(corpus.vocabulary), TrainConfig(9, 4, 16, 0.01, 0)
    )
    given, left = [], []
    loss = CharacterModel.loss

    def spy(self, ids, targets, state=None):
        result = loss(self, ids, targets, state)
        if self is training.fastcell.model and torch.is_grad_enabled():
            given.append(state)
            left.append(result[1])
        return result

    monkeypatch.setattr(CharacterModel, "loss", spy)
    train_side_by_side(training, pieces, windows(corpus.held_out, 1, 14), lambda t: None)
    assert [k for k, state in enumerate(given) if state is None] == [0, 4, 8]
    for before, state in zip(left, given[1:], strict=False):
        assert state is None or all(map(torch.equal, state, before))


def test_measuring_leaves_the_models_as_they_are():
    training, _ = train(steps=1)
    before = [p.detach().clone() for p in training.torch.model.parameters()]
    ours = [p.detach().clone() for p in training.fastcell.model.parameters()]
    ids = torch.randint(20, (16, 4))
    check_step(training.torch.model, training.fastcell.model, ids, ids, training.torch.state)
    assert all(map(torch.equal, before, training.torch.model.parameters()))
    assert all(map(torch.equal, ours, training.fastcell.model.parameters()))


# Agreement: what must not pass


class _WrongGradient(torch.nn.LSTM):
    """Right in the forward pass; the gradient that enters it is off by one part in a thousand."""

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return output * 1.001 - 0.001 * output.detach(), state


class _WrongForward(torch.nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return output + 1e-3, state


@pytest.mark.parametrize(
    ("kind", "ok"), [(torch.nn.LSTM, True), (_WrongGradient, False), (_WrongForward, False)]
)
def test_a_step_that_is_wrong_by_a_thousandth_is_found(kind, ok):
    theirs, ours = tiny_model(library="torch"), tiny_model(library="torch")
    ours.recurrent.__class__ = kind
    torch.nn.init.normal_(ours.readout.weight)  # the step is taken from torch's weights
    torch.manual_seed(0)
    ids = torch.randint(11, (12, 3))
    assert check_step(theirs, ours, ids, ids.roll(-1, 0), None).ok is ok


def test_curves_agree_within_the_noise_of_batches_and_no_farther():
    torch.manual_seed(0)
    steps = torch.arange(200)
    curve = 4 * torch.exp(-steps / 50) + 1 + 0.05 * torch.randn(200)
    error = 0.05 / math.sqrt(20)
    assert check_curves(curve.tolist(), (curve + 0.2 * error).tolist()).ok
    assert not check_curves(curve.tolist(), (curve + 6 * error).tolist()).ok
    late = curve.clone()
    late[150:] += 6 * error
    assert not check_curves(curve.tolist(), late.tolist()).ok
    assert not check_curves(curve.tolist(), [math.nan] * 200).ok
    assert check_curves([0.0] * 7, [0.0] * 7).ok
    assert not check_curves([2.0], [2.001]).ok


# Sampling


def test_temperature_shapes_the_choice():
    logits = torch.tensor([0.0, 1.0, 3.0])
    generator = torch.Generator().manual_seed(0)

    def counts(temperature):
        drawn = [int(choose(logits, temperature, generator)) for _ in range(2000)]
        return torch.bincount(torch.tensor(drawn), minlength=3) / 2000

    for temperature in (0.5, 1.0, 3.0):
        expected = (logits / temperature).softmax(-1)
        # Four standard errors of a share among 2,000.
        assert (counts(temperature) - expected).abs().max() < 4 * math.sqrt(0.25 / 2000)
    for temperature in (0.0, 1e-40, 1e-9):
        assert counts(temperature).tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="not finite"):
        choose(torch.tensor([0.0, math.nan]), 1.0, generator)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_sampling_step_by_step_equals_the_whole_sequence(cell):
    model = tiny_model(cell)
    with torch.no_grad():  # fresh weights say the same all the time; these do not
        for parameter in model.parameters():
            parameter.mul_(12)
    vocabulary = "abcdefghijk"
    text, _ = sample(model, vocabulary, "cab", 30, 0.0, 0)
    logits, _ = model(encode("cab" + text, vocabulary).view(-1, 1))
    predicted = "".join(vocabulary[i] for i in logits[2:-1, 0].argmax(-1))
    assert text == predicted
    assert len(set(text)) > 1


def test_sampling_is_the_seeds_alone():
    model = tiny_model()
    draws = [sample(model, "abcdefghijk", "a", 50, 1.0, seed)[0] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


# The command


def test_json_of_a_run_and_the_picture(prose, capsys):
    threads = torch.get_num_threads()
    assert demo("--text", prose, "--steps", "20", "--json", "--threads", "1") == 0
    assert torch.get_num_threads() == threads
    report = json.loads(capsys.readouterr().out)
    for library, module in (("torch", "torch.nn"), ("fastcell", "fastcell")):
        part = report[library]
        assert part["name"] == f"{module}.LSTM"
        assert len(part["losses"]) == 20
        assert part["losses"][-1] < part["losses"][0]
        assert part["final_loss"] == pytest.approx(sum(part["losses"]) / 20)
        assert part["held_out_loss"] == part["held_out_losses"][-1]
        assert part["characters_per_second"] > 0
        assert part["sampling_characters_per_second"] > 0
    ratios = [
        b / a
        for a, b in zip(
            report["torch"]["block_characters_per_second"],
            report["fastcell"]["block_characters_per_second"],
            strict=True,
        )
    ]
    assert report["training_ratio"] == pytest.approx(sorted(ratios)[len(ratios) // 2])
    assert report["agreement"]["ok"] is True
    exact = report["fastcell"]["held_out_loss"]
    for name, allowed in (("bfloat16", 1e-3), ("int8", 5e-3)):
        found = report["quantized"][name]
        assert found["held_out_loss"] != exact
        assert found["relative_change"] == found["held_out_loss"] / exact - 1
        assert abs(found["relative_change"]) <= allowed
    assert report["config"]["threads"] == 1
    assert len(report["sample"]["text"]) == 60

    from matplotlib.image import imread

    image = imread(report["picture"])
    assert image.shape[0] > 600
    assert image.shape[1] > 1000
    colours = {
        tuple((pixel[:3] * 255).round().astype(int)) for pixel in image[::2, ::2].reshape(-1, 4)
    }
    # The colours of both libraries, and the shades that smooth lines and letters make.
    assert {(0xF2, 0xA6, 0x5A), (0x1D, 0x35, 0x57)} <= colours
    assert len(colours) > 100


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_text_that_repeats_is_learned_by_heart_saved_and_gone_on_with(cell, tmp_path, capsys):
    path, saved = tmp_path / "text", str(tmp_path / "model.pt")
    path.write_text("to be or not\n" * 400)
    common = ["--temperature", "0", "--prompt", "not\nto be"]
    words = ["--text", str(path), "--cell", cell, "--steps", "120", "--learning-rate", "0.02"]
    assert demo(*words, *common, "--save", saved) == 0
    out = capsys.readouterr().out
    expected = ("to be or not\n" * 7)[5:65]
    assert expected.strip("\n") in out
    assert f"fastcell.{cell.upper()}" in out
    assert f"checkpoint: {saved}" in out

    assert demo("--sample-from", saved, *common) == 0
    assert capsys.readouterr().out == "not\nto be" + expected + "\n"
    assert demo("--sample-from", saved, *common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sample"]["text"] == expected
    assert demo("--sample-from", saved, "--temperature", "0") == 0
    assert capsys.readouterr().out.strip() in "to be or not\n" * 20


def test_a_large_vocabulary_on_an_ascii_terminal(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("".join(chr(0x4E00 + i * 7 % 1501) for i in range(4000)), encoding="utf-8")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert demo("--text", str(path), "--steps", "2") == 0
    written = terminal.buffer.getvalue().decode("ascii")
    assert "1,501 different" in written
    assert written.count("?") >= 60


def test_different_results_end_with_status_1(prose, monkeypatch, capsys):
    class Wrong(fastcell.LSTM):
        def forward(self, input, hx=None):
            output, state = super().forward(input, hx)
            return output * 1.01, state

    monkeypatch.setattr(fastcell, "LSTM", Wrong)
    assert demo("--text", prose, "--steps", "3") == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_with_status_1(prose, capsys):
    assert demo("--text", prose, "--steps", "50", "--learning-rate", "1e38", "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--learning-rate" in captured.err
    assert captured.err.count("\n") == 1


# Errors


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read the text"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "too short"),
        (b"short", "too short"),
        (b"abc" * 100 + b"\xff" + b"abc" * 100, "is not UTF-8: byte 0xff at position 300"),
        ("word " * 200, "is not UTF-8"),
        ("folder", "cannot read the text"),
    ],
)
def test_a_bad_text_gets_one_sentence_and_status_2(content, expected, tmp_path, capsys):
    path = tmp_path / "text"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-16")
    elif content is not None:
        path.write_bytes(content)
    assert demo("--text", str(path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastcell demo: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out", "none/x.png"], "cannot write the picture 'none/x.png'"),
        (["--save", "none/x.pt"], "cannot write the checkpoint"),
        (["--out", "."], "it is a folder"),
        (["--out", ""], "it has no name"),
        (["--save", ""], "it has no name"),
        (["--text", ""], "cannot read the text"),
        (["--prompt", "日"], "'日'"),
        (["--sample-from", "none.pt"], "cannot read the checkpoint"),
    ],
)
def test_what_cannot_work_is_said_before_the_training(words, expected, prose, capsys):
    assert demo("--text", prose, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--steps", "0"],
        ["--hidden", "-3"],
        ["--learning-rate", "0"],
        ["--seed", "-1"],
        ["--cell", "tree"],
        ["--save", "a", "--sample-from", "b"],
    ],
)
def test_a_bad_option_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


class _Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def _damaged(content, what):
    if what == "format":
        content["format"] = "another 1"
    elif what == "no weights":
        del content["state_dict"]
    elif what == "vocabulary":
        content["vocabulary"] += "x"
    elif what == "prompt":
        content["prompt"] = "xyz"
    elif what == "shape":
        content["state_dict"]["recurrent.weight_hh_l1"] = torch.zeros(28, 6)
    elif what == "missing":
        del content["state_dict"]["readout.bias"]
    elif what == "dtype":
        content["state_dict"]["readout.bias"] = torch.zeros(11, dtype=torch.int64)
    elif what == "layers":
        content["config"]["layers"] = 10**12
    elif what == "hidden":
        content["config"]["hidden"] = 10**7
    elif what == "cell":
        content["config"]["cell"] = "tree"
    return content


@pytest.mark.parametrize(
    "what",
    [
        "format",
        "no weights",
        "vocabulary",
        "prompt",
        "shape",
        "missing",
        "dtype",
        "layers",
        "hidden",
        "cell",
    ],
)
def test_a_damaged_checkpoint_gets_one_sentence(what, tmp_path, capsys):
    path = str(tmp_path / "model.pt")
    save_checkpoint(path, tiny_model(), "abcdefghijk", "cab")
    torch.save(_damaged(torch.load(path, weights_only=True), what), path)
    assert demo("--sample-from", path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastcell demo: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 300


@pytest.mark.parametrize("what", ["text", "cut", "empty", "pickle", "code"])
def test_a_file_that_is_no_checkpoint_gets_one_sentence_and_runs_nothing(what, tmp_path, capsys):
    path = tmp_path / "model.pt"
    save_checkpoint(str(path), tiny_model(), "abcdefghijk", "cab")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "text": b"It was the best of times",
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "pickle": pickle.dumps({"a": 1}),
            "code": pickle.dumps(_Payload()),
        }[what]
    )
    assert demo("--sample-from", str(path)) == 2
    captured = capsys.readouterr()
    assert "is no checkpoint of fastcell demo" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_gives_the_same_model_back(tmp_path):
    path, model = str(tmp_path / "model.pt"), tiny_model("gru")
    save_checkpoint(path, model, "abcdefghijk", "cab")
    again, vocabulary, prompt = load_checkpoint(path)
    assert (vocabulary, prompt, again.config) == ("abcdefghijk", "cab", model.config)
    ids = torch.randint(11, (9, 2))
    assert torch.equal(again(ids)[0], model(ids)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    # It is a plain state_dict: torch's layers take it as well.
    theirs, _, _ = load_checkpoint(path, "torch")
    assert isinstance(theirs.recurrent, torch.nn.GRU)
    torch.testing.assert_close(theirs(ids)[0], model(ids)[0])


def test_an_interrupt_keeps_what_was_learned(prose, tmp_path, monkeypatch, capsys):
    saved, steps = str(tmp_path / "model.pt"), []
    step = Contender.step

    def interrupted(self, *args, **kwargs):
        steps.append(self)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Contender, "step", interrupted)
    assert demo("--text", prose, "--steps", "9", "--save", saved) == 130
    captured = capsys.readouterr()
    # Blocks of one step: torch, fastcell, torch, fastcell, torch, and the end.
    assert captured.err == (
        f"fastcell demo: interrupted after 2 of 9 steps; the model so far is in {saved}\n"
    )
    weights = load_checkpoint(saved)[0].state_dict()
    learned = steps[-1].model.state_dict()
    assert steps[-1].name == "fastcell.LSTM"
    assert all(torch.equal(weights[name], learned[name]) for name in weights)
    assert not (tmp_path / "fastcell-demo.png").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupt_from_the_keyboard_ends_cleanly(prose):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcell", "demo", "--text", prose, "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # What a shell starts in the background has the signal ignored, and so have its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not process.stdout.readline().startswith("training:"):
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "0%|" in error  # the bar
    bar, sentence = error.rstrip("\n").rsplit("\n", 1)
    assert "Traceback" not in bar
    assert sentence.startswith("fastcell demo: interrupted after ")
