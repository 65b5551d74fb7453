"""Pictures: everything that Hugging Face's image processor and ``load_image`` take, and other image sizes."""

import base64
import binascii
import contextlib
import copy
import io
import os

import torch
from PIL import ExifTags, Image, ImageOps
from torch import nn
from transformers.image_utils import SizeDict, is_valid_image, load_image

SECONDS = 60  # for a picture from a URL; load_image itself would wait for ever
URL = ("http://", "https://")


def load_picture(image):
    """What names or encodes a picture (a path, a URL, base64, a data URL, the bytes of a file), with the pixels of
    ``load_image``, which turns it as its EXIF data say. A picture itself is left to the image processor, which turns
    nothing."""
    content, name = content_of(image), name_of(image)
    if content is None and not isinstance(image, str):
        return image
    try:
        return load_image(image, timeout=SECONDS) if content is None else decoded(content)
    except Exception as error:
        if isinstance(image, str) and not image.startswith(URL) and not os.path.isfile(image):
            raise ValueError(
                f"image {name} is no file, no URL (http:// or https://) and no base64 of a picture: pass one of them"
            ) from error
        raise ValueError(f"image {name} cannot be read as a picture: {in_a_line(error)}") from error


def content_of(image):
    """The bytes of an encoded picture, of its path or its base64; None for all else, such as a URL or pixels."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
        if not os.path.isfile(image):
            raise ValueError(f"image {image!r} is no file: pass the path of one")
    if not isinstance(image, str) or image.startswith(URL):
        return None
    if os.path.isfile(image):
        try:
            with open(image, "rb") as file:
                return file.read()
        except OSError as error:
            raise ValueError(f"image {name_of(image)} cannot be read as a picture: {in_a_line(error)}") from error
    encoded = image.partition(",")[2] if image.startswith("data:image/") else image
    try:
        return base64.decodebytes(encoded.encode(errors="replace"))
    except binascii.Error:
        return b""  # no picture's


def decoded(content):
    """The picture in a file's bytes. Each step that would only copy it is left out; ``Image.draft``, which decodes a
    large JPEG at a fraction of its size, is as well: it gives other pixels."""
    image = Image.open(io.BytesIO(content))
    image.load()  # a TIFF turns itself here; Pillow 13 turns an uncompressed one twice if it opens the path
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def name_of(image):
    """What an error calls a picture: base64 is long, and of a path the end matters."""
    if isinstance(image, bytes):
        return f"of {len(image)} bytes"
    image = os.fspath(image) if isinstance(image, os.PathLike) else str(image)
    return repr(image if len(image) <= 200 else f"{image[:60]}...{image[-60:]}")


def in_a_line(error):
    """The kind of an error and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"


@contextlib.contextmanager
def reading_pixels():
    """What goes wrong inside is a `ValueError` about the picture."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"image cannot be read as a picture: {in_a_line(error)}") from error


def pixel_values_of(processor, image, **settings):
    """What the image processor makes of one picture: fp32 [1, 3, height, width]; `settings` as its call takes them."""
    image = load_picture(image)
    if not is_valid_image(image):
        raise ValueError(
            f"image is a {type(image).__name__}: pass a picture, its path, its URL, its file's bytes, or base64 of it"
        )
    with reading_pixels():
        pixel_values = processor.image_processor(image, return_tensors="pt", **settings).pixel_values
    if len(pixel_values) != 1:
        raise ValueError(f"image holds {len(pixel_values)} pictures: pass a list with one a question")
    return pixel_values


def resize_image(model, processor, image_size):
    """The same model and processor for pictures of another size, such as 480 pixels of a checkpoint for 384.

    The position embeddings are interpolated once, as ``interpolate_pos_encoding=True`` does in every call: trace the
    result. The weights that do not change are shared with `model`.

    Parameters
    ----------
    model : BlipForQuestionAnswering
    processor : BlipProcessor
    image_size : int
        Height and width in pixels, a multiple of the patches of the checkpoint.

    Returns
    -------
    model, processor

    Raises
    ------
    ValueError
        If `image_size` is no such multiple.
    """
    patch = model.config.vision_config.patch_size
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < patch or image_size % patch:
        raise ValueError(
            f"image_size is {image_size!r}; a patch has {patch} pixels: give an int, a multiple of {patch}"
        )
    shared = {id(parameter): parameter for parameter in model.parameters()}
    resized, processor = copy.deepcopy(model, shared), copy.deepcopy(processor)
    embeddings = resized.vision_model.embeddings
    patches = (image_size // patch) ** 2
    with torch.no_grad():
        like = embeddings.position_embedding.new_empty(1, patches + 1, embeddings.embed_dim)
        positions = embeddings.interpolate_pos_encoding(like, image_size, image_size)
    embeddings.position_embedding = nn.Parameter(positions.clone(), embeddings.position_embedding.requires_grad)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = image_size, patches, patches + 1
    resized.config.vision_config.image_size = image_size
    processor.image_processor.size = SizeDict(height=image_size, width=image_size)
    return resized, processor
