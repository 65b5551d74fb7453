"""Pictures by path, URL and base64, with the pixels of Hugging Face's own loading; and other image sizes."""

import base64
import functools
import http.server
import io
import socket
import threading

import numpy as np
import pytest
import torch
from conftest import SIZE, answer_eagerly, cut, make_pixels, make_questions, pad
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BlipImageProcessorPil, BlipProcessor
from transformers.image_utils import load_image

import blip_pictures
from blip_helpers import MODELS, BlipShapes, infer, load_blip, resize_image, trace
from blip_pictures import load_picture, pixel_values_of
from blip_pixels import mean_std_and_factor, normalised, resized_pixels, resizes_alone

ORIENTATION = 0x0112  # of EXIF
LARGER = SIZE + 16  # a patch more
SHAPES = BlipShapes(batch_size=2, num_beams=2, question_length=10, answer_length=8)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def drawing():
    """Another picture whichever way it is turned."""
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    image.paste((200, 30, 30), (0, 0, 25, 10))
    return image


def save(directory, name, orientation=1):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    drawing().save(directory / name, exif=exif)
    return directory / name


def pixels_of_hugging_face(processor, path):
    return processor.image_processor(load_image(str(path)), return_tensors="pt").pixel_values


# What names a picture


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_path_is_turned_as_its_exif_data_say(processor, tmp_path, name, orientation):
    path = save(tmp_path, name, orientation)
    expected = pixels_of_hugging_face(processor, path)
    for image in (path, str(path), path.read_bytes()):
        assert torch.equal(pixel_values_of(processor, image), expected)
    as_stored = processor.image_processor(Image.open(path), return_tensors="pt").pixel_values
    assert torch.equal(pixel_values_of(processor, Image.open(path)), as_stored)  # an opened one is left to Hugging Face
    assert torch.equal(expected, as_stored) == (orientation == 1)


def test_base64_is_loaded_as_its_file(processor, tmp_path):
    path = save(tmp_path, "a.jpg", 6)
    text, expected = base64.b64encode(path.read_bytes()).decode(), pixels_of_hugging_face(processor, path)
    for image in (text, f"data:image/jpeg;base64,{text}"):
        assert torch.equal(pixel_values_of(processor, image), expected)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A directory, and the URL of a server of this machine that gives out its files."""
    directory = tmp_path_factory.mktemp("served")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=directory))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield directory, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_is_loaded_as_its_file(processor, served):
    directory, url = served
    path = save(directory, "turned.jpg", 8)
    assert torch.equal(pixel_values_of(processor, f"{url}/turned.jpg"), pixels_of_hugging_face(processor, path))


def test_questions_about_paths_are_answered_as_about_pictures(assembled, tiny, processor, tmp_path):
    path = save(tmp_path, "a.jpg", 3)
    loaded, questions = load_image(str(path)), ["what is this ?", "where"]
    for model in (assembled, tiny):
        expected = infer(model, processor, questions, loaded, max_new_tokens=7)
        assert infer(model, processor, questions, path, max_new_tokens=7) == expected
        assert infer(model, processor, questions, [str(path), loaded], max_new_tokens=7) == expected


def refused(processor, image, match):
    with pytest.raises(ValueError, match=match) as caught:
        pixel_values_of(processor, image)
    assert "\n" not in str(caught.value)


def test_what_names_no_picture_is_a_value_error(processor, tmp_path):
    refused(processor, tmp_path / "none.jpg", r"none\.jpg' is no file")
    refused(processor, tmp_path, f"{tmp_path.name}' is no file")
    refused(processor, "none.jpg", r"'none\.jpg' is no file, no URL \(http:// or https://\) and no base64")
    refused(processor, "file:///none.jpg", r"'file:///none\.jpg' is no file, no URL")
    refused(processor, "", "'' is no file")
    refused(processor, "data:image/png;base64", "is no file, no URL")
    refused(processor, "\ud800", "is no file, no URL")
    refused(processor, "QUJD" * 1000, r"'(QUJD){15}\.\.\.(QUJD){15}' is no file")


def test_a_file_that_is_no_picture_is_a_value_error(processor, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "short.jpg").write_bytes(save(tmp_path, "a.jpg").read_bytes()[:700])
    for name, why in {"text.png": "cannot identify", "short.jpg": "truncated"}.items():
        for image in (tmp_path / name, str(tmp_path / name)):
            refused(processor, image, f"{tmp_path.name}/{name}' cannot be read as a picture: .*{why}")
        content = (tmp_path / name).read_bytes()
        refused(processor, content, f"image of {len(content)} bytes cannot be read as a picture: .*{why}")


def test_a_url_without_a_picture_is_a_value_error(processor, served, monkeypatch):
    _, url = served
    refused(processor, f"{url}/none.jpg", f"'{url}/none.jpg' cannot be read as a picture")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        monkeypatch.setattr(blip_pictures, "SECONDS", 0.1)
        refused(processor, f"http://127.0.0.1:{port}/a.jpg", f"{port}/a.jpg' cannot be read as a picture: ReadTimeout")
    refused(processor, f"http://127.0.0.1:{port}/a.jpg", f"{port}/a.jpg' cannot be read as a picture: ConnectError")


# Pixels of 8 bits

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBX",
    "RGBA",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)
NARROW = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
SIZES = st.one_of(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.sampled_from([(1, 1), (1, 3000), (3000, 1), (SIZE, SIZE), (SIZE, 5), (2, 900), (700, 500)]),
)


def picture(mode, size, seed, transparency=None):
    """A picture of random numbers, with a palette where the mode has one."""
    random, (width, height) = np.random.default_rng(seed), size
    if mode in NARROW:
        numbers = random.integers(0, 65536 if mode == "I;16" else 300, (height, width))
        return Image.fromarray(numbers.astype(NARROW[mode]))
    count = width * height * len(Image.new(mode, (1, 1)).tobytes())
    count = (width + 7) // 8 * height if mode == "1" else count
    image = Image.frombytes(mode, size, random.bytes(count))
    if mode in ("P", "PA"):
        image.putpalette(random.bytes(768))
    if transparency is not None and mode in ("P", "L", "RGB"):
        image.info["transparency"] = (transparency,) * 3 if mode == "RGB" else transparency
    return image


def before_rescaling(processor, image):
    return processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values


@settings(max_examples=150)
@given(st.sampled_from(MODES), SIZES, st.integers(0, 9), st.sampled_from([None, None, 0, 7]), st.booleans())
def test_the_pixels_are_those_of_the_processor(processor, mode, size, seed, transparency, file):
    image = picture(mode, size, seed, transparency)
    if file and mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):  # opened, not loaded yet
        image.save(content := io.BytesIO(), "png")
        image = Image.open(content)
    try:
        expected = before_rescaling(processor, image)
    except Exception:
        with pytest.raises(ValueError, match="image cannot be read as a picture"):
            resized_pixels(processor, image)
        return
    pixels = resized_pixels(processor, image)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and resizes_alone(processor.image_processor, image)
    assert torch.equal(pixels, expected)
    constants = mean_std_and_factor(processor)
    full = processor.image_processor(image, return_tensors="pt").pixel_values
    assert torch.equal(normalised(pixels, *constants), full)


@settings(max_examples=60)
@given(
    st.sampled_from(["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16"]),
    SIZES,
    st.integers(0, 8),
    st.sampled_from(["png", "jpeg", "tiff"]),
)
@example("P", (30, 20), 6, "png")
def test_encoded_pictures_have_the_pixels_of_load_image(processor, tmp_path_factory, mode, size, orientation, kind):
    path = tmp_path_factory.getbasetemp() / f"encoded.{kind}"
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    try:
        picture(mode, size, 3, transparency=5).save(path, exif=exif)
    except (OSError, SystemError):  # a mode that this kind of file has not
        return
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    loaded = load_image(text)
    if kind != "tiff":  # of which Pillow turns some twice, by their path alone
        assert np.array_equal(load_image(str(path)), loaded)
    for image in (content, str(path), text):
        assert np.array_equal(load_picture(image), loaded)
        assert torch.equal(resized_pixels(processor, image), before_rescaling(processor, loaded))


@settings(max_examples=20)
@given(SIZES, st.integers(0, 9), st.sampled_from(["numpy", "torch", "last", "grey", "whole floats"]))
def test_arrays_are_left_to_the_processor(processor, size, seed, kind):
    image = np.asarray(picture("RGB", size, seed)).transpose(2, 0, 1).copy()
    image = image[:1] if kind == "grey" else image.astype(np.float32) if kind == "whole floats" else image
    image = torch.from_numpy(image) if kind == "torch" else image.transpose(1, 2, 0) if kind == "last" else image
    try:
        expected = before_rescaling(processor, image)
    except Exception:  # where it cannot tell the colours from the rows
        return
    pixels = resized_pixels(processor, image)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels.to(expected.dtype), expected)


def test_fractions_have_no_pixels_of_8_bits(processor):
    fractions = np.random.default_rng(0).random((3, 20, 30), np.float32)
    assert resized_pixels(processor, fractions) is None


@pytest.mark.parametrize(
    "setting",
    [
        {"do_resize": False},
        {"do_convert_rgb": False},
        {"do_center_crop": True, "crop_size": {"height": 20, "width": 24}},
        {"do_pad": True, "pad_size": {"height": 64, "width": 48}},
        {"size": {"shortest_edge": 20}},
        {"resample": 0},
        {"resample": 1},
        {"size": {"height": 20, "width": 70}},
    ],
)
def test_other_settings_of_the_processor(processor, setting):
    other = BlipProcessor(
        BlipImageProcessorPil(**{"size": {"height": SIZE, "width": SIZE}} | setting), processor.tokenizer
    )
    assert torch.equal(resized_pixels(other, drawing()), before_rescaling(other, drawing()))


def test_what_somebody_changed_in_a_processor_acts(processor):
    class Turned(BlipImageProcessorPil):
        def resize(self, image, **kwargs):
            return super().resize(image, **kwargs)[..., ::-1].copy()

    size = {"height": SIZE, "width": SIZE}
    patched, plain = BlipImageProcessorPil(size=size), resized_pixels(processor, drawing())
    patched.resize = Turned(size=size).resize
    for image_processor in (Turned(size=size), patched):
        turned = resized_pixels(BlipProcessor(image_processor, processor.tokenizer), drawing())
        assert torch.equal(turned, plain.flip(-1)) and not torch.equal(turned, plain)


def test_what_is_no_picture_has_no_pixels(processor, tmp_path):
    for wrong, match in ((5, "image is a int: pass a picture"), (b"", "image of 0 bytes"), (tmp_path / "a", "no file")):
        with pytest.raises(ValueError, match=match):
            resized_pixels(processor, wrong)
    with pytest.raises(ValueError, match="image holds 2 pictures"):
        resized_pixels(processor, np.zeros((2, 3, 20, 30), np.uint8))


@given(
    st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3),
    st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3),
    st.sampled_from([1 / 255, 0.00392156862745098, 1 / 127.5, 1 / 256, 1.0]),
)
def test_every_8_bit_number_is_normalised_as_by_the_processor(mean, std, factor):
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    settings = {"do_resize": False, "image_mean": mean, "image_std": std, "rescale_factor": factor}
    expected = BlipImageProcessorPil(**settings)(list(pixels), return_tensors="pt").pixel_values
    assert torch.equal(normalised(pixels, mean, std, factor), expected)


def test_a_processor_that_does_not_normalise_is_a_value_error(processor):
    for name in ("do_rescale", "do_normalize"):
        other = BlipProcessor(BlipImageProcessorPil(**{name: False}), processor.tokenizer)
        with pytest.raises(ValueError, match=f"{name} of the image processor is False.*set it to True"):
            mean_std_and_factor(other)
    other = BlipProcessor(BlipImageProcessorPil(image_mean=0.5, image_std=0.25), processor.tokenizer)
    assert mean_std_and_factor(other) == ((0.5,) * 3, (0.25,) * 3, 1 / 255)
    other = BlipProcessor(BlipImageProcessorPil(image_mean=[0.5, 0.5]), processor.tokenizer)
    with pytest.raises(ValueError, match="a picture has 3 colours"):
        mean_std_and_factor(other)


# Pictures of another size


@pytest.fixture(scope="module")
def resized(tiny, processor):
    return resize_image(tiny, processor, LARGER)


def larger_pixels(count):
    return torch.randn(count, 3, LARGER, LARGER, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decoder", ["padded", "cached"])
def test_compiled_for_another_size_equals_eager_that_interpolates(resized, tiny, tmp_path, decoder):
    compiled = trace(resized[0], tmp_path, SHAPES, decoder=decoder)
    questions, pixels = make_questions([6, 2, 9, 4]), larger_pixels(4)
    ids, mask = pad(questions)
    eager = {"interpolate_pos_encoding": True, "max_new_tokens": SHAPES.answer_length - 1}
    assert cut(compiled.generate(ids, pixels, mask)) == cut(answer_eagerly(tiny, questions, pixels, **eager))
    beams = compiled.generate(ids[:2], pixels[:2], mask[:2], num_beams=2)
    assert cut(beams) == cut(answer_eagerly(tiny, questions[:2], pixels[:2], num_beams=2, **eager))
    with pytest.raises(ValueError, match=f"pixel_values.*{SIZE}.*{LARGER}"):
        compiled.generate(ids[:1], make_pixels(1))


def test_the_image_features_of_another_size_equal_eager(resized, tiny):
    pixels = larger_pixels(2)
    expected = tiny.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(resized[0].vision_model(pixels).last_hidden_state, expected)


def test_the_processor_of_another_size_is_that_of_hugging_face(resized, tiny, processor):
    model, larger = resized
    pixels = pixel_values_of(larger, drawing())
    size = {"height": LARGER, "width": LARGER}
    assert torch.equal(pixels, processor.image_processor(drawing(), size=size, return_tensors="pt").pixel_values)
    inputs = larger(images=drawing(), text="what is this ?", return_tensors="pt")
    answer = tiny.generate(**inputs, interpolate_pos_encoding=True, max_new_tokens=7)[0]
    expected = processor.decode(answer, skip_special_tokens=True)
    assert infer(model, larger, "what is this ?", drawing(), max_new_tokens=7) == expected


def test_the_original_stays_and_lends_its_weights(resized, tiny, processor):
    assert pixel_values_of(processor, drawing()).shape[-1] == tiny.config.vision_config.image_size == SIZE
    ours, theirs = dict(resized[0].named_parameters()), dict(tiny.named_parameters())
    changed = {name for name in theirs if ours[name] is not theirs[name]}
    assert changed == {"vision_model.embeddings.position_embedding"}


def test_another_size_survives_saving(resized, tmp_path):
    for part in resized:
        part.save_pretrained(tmp_path)
    model, processor = load_blip(tmp_path)
    pixels = pixel_values_of(processor, drawing())
    assert torch.equal(pixels, pixel_values_of(resized[1], drawing()))
    features = [m.vision_model(pixels).last_hidden_state for m in (model, resized[0])]
    assert torch.equal(*features)


@pytest.mark.parametrize("size", [0, -16, 15, SIZE + 8, float(LARGER), str(LARGER), True, None, (LARGER, LARGER)])
def test_a_size_that_is_no_multiple_of_a_patch_is_a_value_error(tiny, processor, size):
    with pytest.raises(ValueError, match=r"image_size is .*a patch has 16 pixels: give an int, a multiple of 16"):
        resize_image(tiny, processor, size)


# load_blip()


def test_another_size_can_be_loaded():
    model, processor = load_blip(MODELS / "tiny-blip-vqa", image_size=80)
    original, _ = load_blip(MODELS / "tiny-blip-vqa")
    pixels = pixel_values_of(processor, drawing())
    assert pixels.shape[-1] == 80
    expected = original.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(model.vision_model(pixels).last_hidden_state, expected)


def test_a_processor_from_elsewhere(tiny, processor, tmp_path):
    """The checkpoint may lack one; it is a directory's, or one that the caller has."""
    tiny.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    for known in (tmp_path / "processor", str(tmp_path / "processor"), processor):
        model, loaded = load_blip(tmp_path / "model", processor=known)
        assert isinstance(loaded, BlipProcessor)
        assert loaded.tokenizer("what is this ?").input_ids == processor.tokenizer("what is this ?").input_ids
        assert torch.equal(pixel_values_of(loaded, drawing()), pixel_values_of(processor, drawing()))
        assert torch.equal(model.vision_model(make_pixels(1))[0], tiny.vision_model(make_pixels(1))[0])
    for wrong in (processor.tokenizer, processor.image_processor, 5):
        with pytest.raises(ValueError, match=f"processor is a {type(wrong).__name__}: pass a BlipProcessor"):
            load_blip(tmp_path / "model", processor=wrong)
    with pytest.raises(ValueError, match="none does not exist: pass a directory or a hub name"):
        load_blip(tmp_path / "model", processor=tmp_path / "none")
    with pytest.raises((ValueError, OSError), match="model"):
        load_blip(tmp_path / "model")
