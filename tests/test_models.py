"""The scenes, the two bundled models, and how models are found."""

import json
import re
from collections import Counter
from hashlib import sha256

import pytest
import torch
from conftest import TESTS, make_processor, make_tiny_blip
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageChops
from safetensors.torch import save_file

from blip_helpers import BlipShapes, acting_question_mask, infer, load_blip, load_resnet, trace, verify
from models.scenes import COLOURS, KINDS, LABELS, PLACES, SIZE, SPLITS, examples, scene, shape_examples

MODELS = TESTS.parent / "models"
NUMBERS = st.integers(0, 10**7)


@pytest.fixture(scope="module")
def blip():
    return load_blip(MODELS / "tiny-blip-vqa")


@pytest.fixture(scope="module")
def resnet():
    return load_resnet(MODELS / "tiny-resnet")


@pytest.fixture(scope="module")
def held_out():
    """Those of a kind follow each other: in a batch the longest answer decides how many steps there are."""
    return sorted(examples("held-out", 38 * len(KINDS)), key=lambda example: example.kind)


# Scenes


def fingerprint(example):
    return sha256(example.image.tobytes()).hexdigest(), example.question, example.answer, example.kind


@given(st.sampled_from(SPLITS), NUMBERS)
def test_an_example_depends_on_its_number_alone(split, number):
    (alone,) = examples(split, 1, start=number)
    among = list(examples(split, 3, start=max(0, number - 1)))[min(1, number)]
    assert fingerprint(alone) == fingerprint(among)


def test_examples_are_the_same_on_every_machine():
    digest = sha256()
    for split in SPLITS:
        for example in examples(split, 2 * len(KINDS)):
            digest.update(repr(fingerprint(example)).encode())
        for image, label in shape_examples(split, 8):
            digest.update(image.tobytes() + bytes([label]))
    assert digest.hexdigest() == "0f421c8ddce78be80afbd035a5f15d1ae41c8bc03fcb2d79fab35aea56af1e9d"


@given(st.sampled_from(SPLITS), NUMBERS)
def test_no_picture_can_be_in_both_splits(split, number):
    """A picture's own bytes say to which split it belongs."""
    (example,) = examples(split, 1, start=number)
    ((image, _),) = shape_examples(split, 1, start=number)
    for picture in (example.image, image):
        assert (sha256(picture.tobytes()).digest()[0] < 32) == (split == "held-out")
        assert picture.size == (SIZE, SIZE) and picture.mode == "RGB"


def test_pictures_of_both_splits_differ_and_hardly_repeat():
    pictures = {split: {e.image.tobytes() for e in examples(split, 200)} for split in SPLITS}
    assert not pictures["train"] & pictures["held-out"]
    assert all(len(of_split) == 200 for of_split in pictures.values())


def test_an_unknown_split_is_a_value_error():
    with pytest.raises(ValueError, match="test"):
        list(examples("test", 1))


def near(image, colour, box):
    """Pixels of a box that have this colour, give or take its shade."""
    red, green, blue = (
        channel.point(lambda value, wanted=wanted: 255 * (abs(value - wanted) <= 15))
        for channel, wanted in zip(image.crop(box).split(), COLOURS[colour], strict=True)
    )
    return ImageChops.darker(ImageChops.darker(red, green), blue).histogram()[255]


@given(NUMBERS)
def test_the_picture_shows_what_the_scene_says(seed):
    drawn = scene(seed)
    assert 1 <= len(drawn.things) <= 5
    assert (
        len({thing.cell for thing in drawn.things}) == len({str(thing) for thing in drawn.things}) == len(drawn.things)
    )
    for thing in drawn.things:
        row, column = thing.cell
        box = (21 * column, 21 * row, 21 * column + 22, 21 * row + 22)
        assert near(drawn.image, thing.colour, box) >= 30


ANSWERS = {
    "count": r"[1-5]",
    "count colour": r"[0-5]",
    "corner": r"nothing|a (\w+) (\w+)",
    "colour": "|".join(COLOURS),
    "is there": r"yes|no",
    "where": "|".join(PLACES.values()),
    "describe": r"a \w+ \w+((, a \w+ \w+)* and a \w+ \w+)?",
    "left or right": r"left|right",
}


@given(st.sampled_from(SPLITS), NUMBERS)
def test_every_kind_has_its_answers(split, number):
    (example,) = examples(split, 1, start=number)
    assert example.kind == KINDS[number % len(KINDS)]
    assert re.fullmatch(ANSWERS[example.kind], example.answer)


def test_there_are_seven_kinds_and_every_one_is_asked(held_out):
    assert len(KINDS) >= 7
    assert Counter(example.kind for example in held_out) == {kind: len(held_out) // len(KINDS) for kind in KINDS}


def test_no_answer_can_be_guessed_from_the_question_alone(held_out):
    answers = {}
    for example in held_out:
        answers.setdefault(example.kind, set()).add(example.answer)
    assert all(len(of_kind) >= 2 for of_kind in answers.values())


# The bundled BLIP


def test_questions_and_answers_fit_the_shapes_that_are_traced_by_default(blip, held_out):
    tokenizer = blip[1].tokenizer
    questions = [len(ids) for ids in tokenizer([e.question for e in held_out]).input_ids]
    answers = [
        len(ids) for ids in tokenizer([e.answer for e in held_out]).input_ids
    ]  # [CLS] in the start token's place
    shapes = BlipShapes()
    assert min(questions) >= 4 and max(questions) <= shapes.question_length
    assert 18 <= max(answers) <= shapes.answer_length
    assert min(answers) == 3


def test_the_tokenizer_knows_every_word(blip, held_out):
    tokenizer = blip[1].tokenizer
    for example in held_out:
        for text in (example.question, example.answer):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_the_start_token_is_a_special_token(blip):
    model, processor = blip
    start = model.config.text_config.bos_token_id
    assert processor.tokenizer.convert_ids_to_tokens(start) == "[DEC]"
    assert start in processor.tokenizer.all_special_ids
    assert processor.tokenizer.decode([start, 3], skip_special_tokens=True) == ""


def test_the_bundled_blip_is_a_plain_checkpoint(blip):
    model, _ = blip
    assert type(model).__name__ == "BlipForQuestionAnswering" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in (MODELS / "tiny-blip-vqa").iterdir()
    }
    assert json.loads((MODELS / "tiny-blip-vqa" / "config.json").read_text())["architectures"] == [
        "BlipForQuestionAnswering"
    ]


@pytest.mark.parametrize(("folder", "most"), [("tiny-blip-vqa", 12e6), ("tiny-resnet", 3e6)])
def test_the_bundled_models_are_small(folder, most):
    assert 1e5 < sum(path.stat().st_size for path in (MODELS / folder).rglob("*") if path.is_file()) <= most


@pytest.fixture(scope="module")
def compiled(blip, tmp_path_factory):
    # Many rows of the decoder, but one question about an image, which is what is asked here.
    return trace(blip[0], tmp_path_factory.mktemp("bundled"), BlipShapes(batch_size=1, num_beams=38))


@pytest.fixture(scope="module")
def answered(compiled, blip, held_out):
    return infer(compiled, blip[1], [e.question for e in held_out], [e.image for e in held_out])


def test_the_bundled_blip_answers_held_out_questions(answered, held_out):
    right = sum(answer == example.answer for answer, example in zip(answered, held_out, strict=True))
    assert right / len(held_out) >= 0.97


def test_the_longest_answers_are_right_too(answered, held_out):
    described = [(a, e.answer) for a, e in zip(answered, held_out, strict=True) if e.kind == "describe"]
    assert sum(a == b for a, b in described) / len(described) >= 0.9
    assert max(len(b.split()) for a, b in described if a == b) >= 16


def test_the_bundled_blip_answers_compiled_as_eager(compiled, blip, held_out):
    checked = list(verify(compiled, *blip, held_out[::13]))
    assert all(v.actual == v.expected for v in checked)
    assert max(v.difference for v in checked) < 1e-4


def test_padding_changes_no_logit_of_the_bundled_blip(blip, held_out):
    model, processor = blip
    with torch.no_grad(), acting_question_mask(model):
        for example in held_out[::19]:
            inputs = processor(images=example.image, text=example.question, return_tensors="pt")
            padded = processor(
                images=example.image, text=example.question, padding="max_length", max_length=16, return_tensors="pt"
            )
            answer = processor.tokenizer(example.answer, return_tensors="pt").input_ids
            answer[:, 0] = model.config.text_config.bos_token_id
            image = model.vision_model(inputs.pixel_values).last_hidden_state
            logits = []
            for ids, mask in ((inputs.input_ids, inputs.attention_mask), (padded.input_ids, padded.attention_mask)):
                embeds = model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
                decoded = model.text_decoder(answer, encoder_hidden_states=embeds, encoder_attention_mask=mask)
                logits.append(decoded.logits)
            torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


# The bundled ResNet


def test_the_bundled_resnet_names_held_out_pictures(resnet):
    model, processor = resnet
    images, labels = zip(*shape_examples("held-out", 300), strict=True)
    with torch.no_grad():
        named = model(**processor(list(images), return_tensors="pt")).logits.argmax(-1)
    assert (named == torch.tensor(labels)).float().mean() >= 0.97
    assert [model.config.id2label[i] for i in range(len(LABELS))] == list(LABELS)
    assert not model.training


# Which model is loaded


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("other")
    make_tiny_blip().save_pretrained(directory)
    make_processor().save_pretrained(directory)
    return directory


def vocabulary(model):
    return model.config.text_config.vocab_size


def test_blip_comes_from_the_argument_then_the_environment_then_the_repository(other_checkpoint, monkeypatch, blip):
    own, other = vocabulary(blip[0]), vocabulary(make_tiny_blip())
    assert own != other
    monkeypatch.delenv("BLIP_MODEL", raising=False)
    assert vocabulary(load_blip()[0]) == own
    monkeypatch.setenv("BLIP_MODEL", str(other_checkpoint))
    assert vocabulary(load_blip()[0]) == other
    assert vocabulary(load_blip(MODELS / "tiny-blip-vqa")[0]) == own


def test_a_checkpoint_loads_as_it_was_saved(other_checkpoint, tiny, processor):
    model, loaded = load_blip(other_checkpoint)
    assert not model.training
    for name, value in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert loaded.tokenizer("what is this ?").input_ids == processor.tokenizer("what is this ?").input_ids


def test_a_half_precision_checkpoint_is_loaded_in_fp32(tmp_path):
    make_tiny_blip().half().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert {p.dtype for p in load_blip(tmp_path)[0].parameters()} == {torch.float32}


# Checkpoints whose weights are not all there, or not those of the model

EMBEDDING = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


WRONG_WEIGHTS = {
    "a prefix": (lambda w: {f"module.{name}": weight for name, weight in w.items()}, r"lacks \d+ .*module\."),
    "a compiled module": (lambda w: {f"_orig_mod.{n}": t for n, t in w.items()}, r"lacks \d+ .*_orig_mod\."),
    "none": (lambda w: {}, r"lacks \d+ |cannot be read"),
    "one missing": (
        lambda w: without(w, "vision_model.post_layernorm.bias"),
        r"lacks 1 .*\(vision_model.post_layernorm.bias\)",
    ),
    "embedding and head missing": (lambda w: without(w, EMBEDDING, HEAD), "lacks .*word_embeddings"),
    "a head more": (lambda w: w | {"itm_head.weight": torch.zeros(2, 32)}, r"has 1 others? .*\(itm_head.weight\)"),
    "another size": (
        lambda w: w | {"vision_model.post_layernorm.bias": torch.zeros(31)},
        r"vision_model.post_layernorm.bias is \[31\], .*\[32\]",
    ),
    "a vocabulary more": (
        lambda w: w | {"text_encoder.embeddings.word_embeddings.weight": torch.zeros(60, 32)},
        r"text_encoder.embeddings.word_embeddings.weight is \[60, 32\]",
    ),
}


def save_weights(directory, weights, kind):
    """A checkpoint of the tiny model with these weights in place of its own."""
    make_tiny_blip().save_pretrained(directory)
    make_processor().save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(weights, directory / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file({n: w.clone() for n, w in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(weights)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, some in shards.items():
            save_file({name: weights[name].clone() for name in some}, directory / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_a_checkpoint_without_its_weights_is_a_value_error(tmp_path, wrong, kind, capfd):
    change, message = WRONG_WEIGHTS[wrong]
    save_weights(tmp_path, change(make_tiny_blip().state_dict()), kind)
    capfd.readouterr()
    with pytest.raises(ValueError, match=message) as refused:
        load_blip(tmp_path)
    assert "save_pretrained" in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).count(",") < 12 and capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w,
        lambda w: without(w, HEAD, "text_decoder.cls.predictions.decoder.bias"),  # tied
        lambda w: without(w, EMBEDDING),  # tied, the other way round
        lambda w: w | {"text_encoder.embeddings.position_ids": torch.arange(32)[None]},  # as old checkpoints have
        lambda w: {name: weight.half() for name, weight in w.items()},
    ],
)
def test_a_checkpoint_with_all_its_weights_is_loaded(tmp_path, tiny, change, kind):
    save_weights(tmp_path, change(tiny.state_dict()), kind)
    model, _ = load_blip(tmp_path)
    for name, weight in tiny.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"{}", b"junk" * 100], ids=["empty", "short", "other"])
def test_weights_that_cannot_be_read_are_a_value_error(tmp_path, name, content):
    save_weights(tmp_path, {}, "bin")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
        load_blip(tmp_path)


def test_a_resnet_without_its_counters_is_loaded_and_without_a_weight_refused(tmp_path):
    model, image_processor = load_resnet(MODELS / "tiny-resnet")
    weights = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={n: w for n, w in weights.items() if "num_batches" not in n})
    image_processor.save_pretrained(tmp_path)
    assert torch.equal(load_resnet(tmp_path)[0].classifier[1].bias, weights["classifier.1.bias"])
    model.save_pretrained(tmp_path, state_dict=without(weights, "classifier.1.bias"))
    with pytest.raises(ValueError, match=r"lacks 1 .*\(classifier.1.bias\)"):
        load_resnet(tmp_path)


def test_a_model_loaded_in_inference_mode_works_outside(other_checkpoint):
    with torch.inference_mode():
        model, _ = load_blip(other_checkpoint)
    assert not any(p.is_inference() for p in model.parameters())


def test_a_resnet_can_be_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_MODEL", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none does not exist"):
        load_resnet()
    monkeypatch.delenv("RESNET_MODEL")
    assert load_resnet()[0].config.num_labels == len(LABELS)
