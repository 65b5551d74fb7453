"""Pictures by path, URL and base64, with the pixels of Hugging Face's own loading; and other image sizes."""

import base64
import functools
import http.server
import socket
import threading

import pytest
import torch
from conftest import SIZE, answer_eagerly, cut, make_pixels, make_questions, pad
from PIL import Image
from transformers import BlipProcessor
from transformers.image_utils import load_image

import blip_pictures
from blip_helpers import MODELS, BlipShapes, infer, load_blip, resize_image, trace
from blip_pictures import pixel_values_of

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
    for given in (path, str(path)):
        assert torch.equal(pixel_values_of(processor, given), expected)
    as_stored = processor.image_processor(Image.open(path), return_tensors="pt").pixel_values
    assert torch.equal(pixel_values_of(processor, Image.open(path)), as_stored)  # an opened one is left to Hugging Face
    assert torch.equal(expected, as_stored) == (orientation == 1)


def test_base64_is_loaded_as_its_file(processor, tmp_path):
    path = save(tmp_path, "a.jpg", 6)
    text, expected = base64.b64encode(path.read_bytes()).decode(), pixels_of_hugging_face(processor, path)
    for given in (text, f"data:image/jpeg;base64,{text}"):
        assert torch.equal(pixel_values_of(processor, given), expected)


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
    refused(processor, "QUJD" * 1000, r"'(QUJD){15}\.\.\.(QUJD){15}' is no file")


def test_a_file_that_is_no_picture_is_a_value_error(processor, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "short.jpg").write_bytes(save(tmp_path, "a.jpg").read_bytes()[:700])
    for name, why in {"text.png": "cannot identify", "short.jpg": "truncated"}.items():
        for given in (tmp_path / name, str(tmp_path / name)):
            refused(processor, given, f"{tmp_path.name}/{name}' cannot be read as a picture: .*{why}")


def test_a_url_without_a_picture_is_a_value_error(processor, served, monkeypatch):
    _, url = served
    refused(processor, f"{url}/none.jpg", f"'{url}/none.jpg' cannot be read as a picture")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        monkeypatch.setattr(blip_pictures, "SECONDS", 0.1)
        refused(processor, f"http://127.0.0.1:{port}/a.jpg", f"{port}/a.jpg' cannot be read as a picture: ReadTimeout")
    refused(processor, f"http://127.0.0.1:{port}/a.jpg", f"{port}/a.jpg' cannot be read as a picture: ConnectError")


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
    for given in (tmp_path / "processor", str(tmp_path / "processor"), processor):
        model, loaded = load_blip(tmp_path / "model", processor=given)
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
