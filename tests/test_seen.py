"""Seen pictures: known by their content, bounded, shared by threads."""

import base64
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blip_seen import SeenPictures, content_hash

FEATURES = 4 * 100  # bytes of those that `Encoder` makes


class Encoder:
    """Returns other features each time that it is called."""

    def __init__(self):
        self.given = []

    def __call__(self, image):
        self.given.append(image)
        return torch.full((100,), float(len(self.given)))


@pytest.fixture
def encode():
    return Encoder()


def drawing(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def array(seed=0):
    return np.asarray(drawing(seed=seed)).copy()


def test_a_picture_that_comes_again_is_not_encoded_again(encode, tmp_path):
    drawing().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for image in (drawing(), array(), torch.from_numpy(array()), content):
        seen, count = SeenPictures(10_000), len(encode.given)
        first = seen.features(image, encode)
        again = image if isinstance(image, bytes) else image.copy() if hasattr(image, "copy") else image.clone()
        assert torch.equal(seen.features(again, encode), first)
        assert (seen.hits, seen.misses, len(seen), seen.bytes, len(encode.given)) == (1, 1, 1, FEATURES, count + 1)


def test_a_path_and_base64_are_known_by_their_content(encode, tmp_path):
    drawing().save(tmp_path / "a.png")
    content, seen = (tmp_path / "a.png").read_bytes(), SeenPictures(10_000)
    (tmp_path / "b.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    for image in (tmp_path / "a.png", str(tmp_path / "b.png"), content, text, f"data:image/png;base64,{text}"):
        seen.features(image, encode)
    assert encode.given == [content] and seen.hits == 4
    drawing(seed=1).save(tmp_path / "a.png")
    seen.features(tmp_path / "a.png", encode)
    assert encode.given[1:] == [(tmp_path / "a.png").read_bytes()]


def test_what_is_behind_a_url_is_encoded_each_time(encode):
    seen = SeenPictures(10_000)
    for _ in range(2):
        seen.features("https://example.org/a.png", encode)
    assert len(encode.given) == 2 and (seen.hits, seen.misses, len(seen)) == (0, 2, 0)


@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I;16"]), st.integers(0, 29), st.integers(0, 19)
)
def test_a_pixel_makes_another_picture_and_so_does_changing_one_that_was_seen(mode, x, y):
    image = drawing().convert("L").convert("I").convert(mode) if mode == "I;16" else drawing(mode)
    before = content_hash(image)
    assert content_hash(image.copy()) == before
    pixel = image.getpixel((x, y))
    other = (*pixel[:-1], pixel[-1] ^ 1) if isinstance(pixel, tuple) else pixel + 1 if mode == "F" else int(pixel) ^ 1
    image.putpixel((x, y), 255 - pixel if mode == "1" else other)
    assert content_hash(image) != before
    image.putpixel((x, y), pixel)
    assert content_hash(image) == before


def test_what_the_bytes_mean_makes_another_picture():
    grey, palette = drawing("L"), drawing("P")
    alike = [grey, Image.frombytes("L", (20, 30), grey.tobytes())]
    alike += [Image.frombytes("P", grey.size, grey.tobytes()), np.asarray(grey), np.asarray(grey).reshape(30, 20)]
    alike += [np.asarray(grey).view(np.int8), torch.from_numpy(np.array(grey)), torch.from_numpy(np.array(grey))[None]]
    alike += [grey.tobytes(), palette]
    recoloured, see_through, other = palette.copy(), palette.copy(), palette.copy()
    recoloured.putpalette(bytes(range(256)) * 3)
    see_through.info["transparency"], other.info["transparency"] = 5, 6
    alike += [recoloured, see_through, other]
    assert len({content_hash(image) for image in alike}) == len(alike)


def test_a_picture_of_many_strips_is_hashed_to_its_last_pixel():
    for mode in ("1", "L", "RGB", "I;16"):
        image = Image.new(mode, (700, 1501))
        hashes = {content_hash(image)}
        for at in ((0, 0), (699, 373), (0, 375), (699, 1500)):
            image.putpixel(at, (1, 2, 3) if mode == "RGB" else 1)
            hashes.add(content_hash(image))
        assert len(hashes) == 5


def test_arrays_and_tensors_that_lie_otherwise_in_memory_are_the_same():
    pixels = array()
    assert content_hash(pixels) == content_hash(np.asfortranarray(pixels)) != content_hash(pixels[:, ::-1])
    tensor = torch.from_numpy(pixels)
    assert content_hash(tensor) == content_hash(tensor.transpose(0, 1).contiguous().transpose(0, 1))
    half = torch.randn(3, 4).to(torch.bfloat16)
    assert content_hash(half) == content_hash(half.clone()) != content_hash(half.view(torch.float16))
    assert content_hash(torch.tensor(1.0)) != content_hash(torch.tensor(2.0))


def test_what_cannot_be_hashed_is_encoded_each_time(encode):
    seen = SeenPictures(10_000)
    for image in (torch.empty(3, 4, device="meta"), np.array([None]), torch.eye(3).to_sparse(), object()):
        for _ in range(2):
            seen.features(image, encode)
    assert len(encode.given) == 8 and len(seen) == 0


def test_the_least_recently_used_are_forgotten(encode):
    seen = SeenPictures(2 * FEATURES + 1)
    for name in (b"a", b"b", b"a", b"c", b"a", b"b"):
        seen.features(name, encode)
        assert seen.bytes <= seen.max_bytes and seen.bytes == len(seen) * FEATURES
    assert encode.given == [b"a", b"b", b"c", b"b"] and (seen.hits, seen.misses) == (2, 4)


def test_features_larger_than_the_bound_are_not_kept(encode):
    seen = SeenPictures(FEATURES - 1)
    for _ in range(2):
        assert len(seen.features(b"a", encode)) == 100
    assert len(encode.given) == 2 and len(seen) == seen.bytes == 0


def test_a_part_of_a_batch_keeps_that_part_alone():
    batch, seen = torch.randn(8, 100), SeenPictures(10_000)
    seen.features(b"a", lambda image: batch[2:3])
    kept = seen.features(b"a", None)
    assert torch.equal(kept, batch[2:3]) and kept.untyped_storage().nbytes() == seen.bytes == FEATURES


def test_an_error_of_the_encoder_leaves_nothing(encode):
    seen = SeenPictures(10_000)
    with pytest.raises(ZeroDivisionError):
        seen.features(b"a", lambda image: 1 / 0)
    with pytest.raises(ValueError, match=r"encode returned .*: it has to return a tensor"):
        seen.features(b"a", lambda image: [1])
    assert len(seen) == 0 and len(seen.features(b"a", encode)) == 100


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1", True, None, float("inf")])
def test_a_bound_that_is_no_number_of_bytes_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=r"max_bytes is .*: give a whole number of at least 1"):
        SeenPictures(wrong)


def test_nobody_waits_while_another_picture_is_encoded():
    """The first encoder does not end before the others, of the same picture too, have their features."""
    seen, started, done, results = SeenPictures(10_000), threading.Event(), threading.Event(), []

    def slowly(image):
        started.set()
        assert done.wait(60)
        return torch.full((100,), 7.0)

    thread = threading.Thread(target=lambda: results.append(seen.features(b"slow", slowly)))
    thread.start()
    assert started.wait(60)
    for name in (b"other", b"slow"):
        assert seen.features(name, lambda image: torch.full((100,), 7.0))[0] == 7
    done.set()
    thread.join(60)
    assert len(results) == 1 and results[0][0] == 7
    assert seen.bytes == len(seen) * FEATURES == 2 * FEATURES  # the one encoded twice counts once


def test_threads_get_the_features_of_their_own_pictures():
    seen, wrong = SeenPictures(5 * FEATURES), []

    def ask(seed):
        order = np.random.default_rng(seed).integers(0, 12, 400)
        for number in map(int, order):
            features = seen.features(bytes([number]), lambda image: torch.full((100,), float(image[0])))
            if features[0] != number or not 0 <= seen.bytes <= seen.max_bytes:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and seen.hits + seen.misses == 1600 and seen.bytes == len(seen) * FEATURES
