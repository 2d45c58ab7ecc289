"""Sounds and their texts, for a model that hears."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from shiradelta.errors import SourceError
from shiradelta.fit.text_behaviour import LEAST_WEIGHT, TextBehaviour
from shiradelta.models.processors import SpeechProcessor, load_processor
from shiradelta.text import speech
from shiradelta.text.examples import training_examples
from shiradelta.text.kinds import COMPLETION, SPEECH
from shiradelta.text.read import ExampleSet, read_file, read_list
from shiradelta.text.sound import Sound, open_sound
from shiradelta.text.tokenise import tokenise
from tests.fit.test_fit import build as build_other
from tests.seq2seq import build as build_seq2seq
from tests.seq2seq import write_tokenizer
from tests.speech import RATE, build, extractor, sound, write_examples, write_model


@pytest.fixture
def processor(tmp_path: Path) -> SpeechProcessor:
    return SpeechProcessor(write_tokenizer("bart", tmp_path), extractor())


def given(*seconds: float) -> ExampleSet:
    rows = [
        {"audio": {"array": sound(n, length), "sampling_rate": RATE}, "text": " ".join(["w1"] * (n + 1))}
        for n, length in enumerate(seconds)
    ]
    found = read_list(rows)
    assert found is not None
    return found


def test_the_loss_is_that_of_transformers(processor: SpeechProcessor):
    model: Any = build()
    examples = given(0.3, 0.9)
    with torch.no_grad():
        nats, number = torch.zeros(()), 0
        for heard, text in examples.rows:
            features = extractor()(heard.samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
            labels = torch.tensor([processor.tokenizer(text)["input_ids"][1:]])  # shifting adds the first
            nats += model(input_features=features, labels=labels).loss * labels.numel()
            number += labels.numel()
        found = training_examples(examples, processor, model, 16).loss(model, [0, 1])
    torch.testing.assert_close(found, nats / number)


def test_silence_after_the_sound_counts_the_least(processor: SpeechProcessor):
    """The encoder makes 50 rows of a second."""
    model = build()
    behaviour = TextBehaviour(processor, given(0.3, 0.5), model, 16)
    with torch.no_grad():
        outputs = behaviour.outputs(model, [1, 0])
        alone = [behaviour.outputs(model, [index]) for index in (1, 0)]
    assert [len(rows) for rows in outputs] == [25 + 15] * 2 + [3 + 2] * 3
    for rows, *separate in zip(outputs, *alone, strict=True):
        torch.testing.assert_close(rows, torch.cat(separate), atol=1e-5, rtol=1e-4)
    shares = behaviour.token_weights([1, 0], 100)
    assert shares is not None
    expected = [1.0] * 25 + [LEAST_WEIGHT] * 25 + [1.0] * 15 + [LEAST_WEIGHT] * 35
    assert shares.tolist() == pytest.approx(expected)


def test_features_beyond_what_is_kept_are_made_again(processor: SpeechProcessor, monkeypatch: pytest.MonkeyPatch):
    model = build()
    kept = tokenise(given(0.3, 0.5), processor, model, 16)
    monkeypatch.setattr(speech, "KEPT", 0)
    again = tokenise(given(0.3, 0.5), processor, model, 16)
    for _ in range(2):
        one, other = (found.arguments([1, 0])["input_features"] for found in (kept, again))
        assert torch.equal(one, other)


def wav(samples: Any, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_wav_files_of_every_depth_have_the_same_samples(dtype: Any, tmp_path: Path):
    plain = sound(3, 0.2)
    scale = {np.uint8: 127, np.int16: 2**15 - 1, np.int32: 2**31 - 128, np.float32: 1}[dtype]
    stored = (plain * scale + (128 if dtype is np.uint8 else 0)).astype(dtype)
    (tmp_path / "a.wav").write_bytes(wav(stored))
    found = open_sound(str(tmp_path / "a.wav"))
    assert found.rate == RATE
    np.testing.assert_allclose(found.samples, plain, atol=0.02 if dtype is np.uint8 else 1e-4)


def test_channels_are_averaged_and_rates_changed(tmp_path: Path):
    plain, fast = sound(3, 0.5), sound(3, 0.5, 48000)
    (tmp_path / "a.wav").write_bytes(wav(np.stack([2 * fast, 0 * fast], 1), 48000))
    found = open_sound(str(tmp_path / "a.wav"))
    assert found.samples.ndim == 1
    at_rate = found.at_rate(RATE)
    assert at_rate.dtype == np.float32
    np.testing.assert_allclose(at_rate[500:-500], plain[500:-500], atol=0.01)


def test_paths_start_from_the_examples_file(tmp_path: Path, processor: SpeechProcessor):
    path = write_examples(tmp_path / "data", 12)
    found = read_file(path)
    assert found.kind is SPEECH
    assert found.rows[0][0] == str(tmp_path / "data" / "clips" / "0.wav")
    one = tokenise(found, processor, build(), 16)
    assert set(one.arguments([0])) == {"input_features", "decoder_input_ids", "use_cache"}
    assert read_file(f"{path}:text").kind.name == "text"


def test_a_datasets_column_of_undecoded_files(tmp_path: Path):
    found = read_list([{"audio": {"bytes": wav(sound(1, 0.2)), "path": None}, "text": "w1"}])
    assert found is not None
    assert isinstance(found.rows[0][0], Sound)
    np.testing.assert_allclose(found.rows[0][0].samples, sound(1, 0.2))


def test_what_tells_sounds_from_others_is_what_they_hold(tmp_path: Path):
    path = write_examples(tmp_path / "data", 12)
    before = read_file(path).identity
    assert before == read_file(path).identity
    json.dumps(before)
    (tmp_path / "data" / "clips" / "3.wav").write_bytes(wav(sound(7, 0.5)))
    after = read_file(path).identity
    assert [n for n in range(12) if before[n] != after[n]] == [3]
    assert given(0.2).identity == given(0.2).identity != given(0.3).identity
    assert str(given(0.2).plain) == str(given(0.2).plain) != str(given(0.3).plain)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (3, "example 1: its audio is no sound; give the path of a WAV file"),
        ({"array": [0.0]}, "is no sound"),
        ({"array": np.zeros((2, 5)), "sampling_rate": RATE}, r"an array of float64 \[2, 5\]; give samples of one"),
        ({"array": np.zeros(0), "sampling_rate": RATE}, "give samples of one channel"),
        ({"array": np.zeros(5), "sampling_rate": 0}, "a sampling rate of 0; give samples a second"),
        ({"bytes": b"ID3 not a wav"}, "its audio: is no WAV file that can be read .*convert it"),
        ({"array": np.array([0, np.nan]), "sampling_rate": RATE}, "its audio: has samples that are NaN"),
        (" ", "example 1: its audio is no sound; give the path"),
        ("https://x.org/a.wav", "example 1: https://x.org/a.wav is a web address, and nothing is downloaded"),
    ],
)
def test_what_is_no_sound_is_refused_when_it_is_read(audio: Any, message: str):
    with pytest.raises(SourceError, match=message):
        read_list([{"audio": audio, "text": "w1"}])


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (b"OggS and more that is no wav", "a.wav: is no WAV file that can be read"),
        (b"", "a.wav: is no WAV file"),
        (wav(np.zeros(0, np.int16)), "a.wav: has no samples"),
        (wav(sound(1, 0.2))[:30], "a.wav: is no WAV file that can be read"),
        (wav(sound(1, 0.2))[:-1000], "a.wav: ends before its last sample; copy the file again"),
        (wav(np.full(100, np.nan, np.float32)), "a.wav: has samples that are NaN or infinite; leave the example out"),
        (wav(sound(1, 0.2), 0), "a.wav: says that it has 0 samples a second; convert it again"),
        (None, "a.wav: cannot be read .No such file"),
        (wav(np.zeros(RATE + 1, np.int16)), "a.wav: has 1.0+6 seconds of sound, of which the model hears 1; cut it"),
    ],
)
def test_a_file_that_cannot_be_heard_is_refused(
    held: bytes | None, message: str, tmp_path: Path, processor: SpeechProcessor
):
    if held is not None:
        (tmp_path / "a.wav").write_bytes(held)
    with pytest.raises(SourceError, match=message):
        tokenise(ExampleSet(SPEECH, [[str(tmp_path / "a.wav"), "w1"]]), processor, build(), 16)


def test_a_header_that_leaves_the_length_open_is_no_cut(tmp_path: Path):
    """As `ffmpeg -f wav -` writes it."""
    whole = wav(sound(1, 0.2))
    at = whole.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:at] + b"\xff" * 4 + whole[at + 4 :])
    np.testing.assert_array_equal(open_sound(str(tmp_path / "a.wav")).samples, sound(1, 0.2))


def test_examples_have_to_suit_the_model(processor: SpeechProcessor, tmp_path: Path):
    heard = given(0.2)
    for model in (build_other("causal"), build_seq2seq("t5")):
        with pytest.raises(
            SourceError, match="hears nothing as Whisper does, so audio is no example for it; FILE:text"
        ):
            TextBehaviour(processor, heard, model, 16)
    with pytest.raises(SourceError, match="gets no prompts; leave the prompt share out"):
        TextBehaviour(processor, heard, build(), 16, prompt_share=0.5)
    with pytest.raises(
        SourceError, match=r'WhisperForConditionalGeneration hears sound; give {"audio": "\.\.\.", "text"'
    ):
        TextBehaviour(processor.tokenizer, ExampleSet(COMPLETION, [["w1", "w2"]]), build(), 16)


def test_the_folder_says_what_is_heard(tmp_path: Path):
    write_model(tmp_path / "model")
    found = load_processor("sound", tmp_path / "model")
    assert found.feature_extractor.sampling_rate == RATE
    (tmp_path / "tuned").mkdir()
    assert load_processor("sound", tmp_path / "model", tmp_path / "tuned").tokenizer("w1")["input_ids"] == [2, 5, 1]
    write_tokenizer("t5", tmp_path / "tuned")  # as the language's mark, which the fine-tune's writes
    assert load_processor("sound", tmp_path / "model", tmp_path / "tuned").tokenizer("w1")["input_ids"] == [5, 1]
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(
        SourceError, match=r"has no preprocessor_config\.json, which says what the model gets of a sound"
    ):
        load_processor("sound", tmp_path / "model")
