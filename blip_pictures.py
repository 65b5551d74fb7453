"""Pictures: everything that Hugging Face's image processor and ``load_image`` take, and other image sizes."""

import copy
import os

import torch
from torch import nn
from transformers.image_utils import SizeDict, is_valid_image, load_image

SECONDS = 60  # for a picture from a URL; load_image itself would wait for ever


def load_picture(image):
    """What names a picture (a path, a URL, base64, a data URL), loaded by ``load_image``, which turns it as its EXIF
    data say. A picture itself is left to the image processor, which turns nothing."""
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
        if not os.path.isfile(image):
            raise ValueError(f"image {image!r} is no file: pass the path of one")
    if not isinstance(image, str):
        return image
    name = image if len(image) <= 200 else f"{image[:60]}...{image[-60:]}"  # base64 is long; a path's end matters
    url = image.startswith(("http://", "https://"))
    try:
        return load_image(image, timeout=SECONDS)
    except Exception as error:
        if url or os.path.isfile(image):
            raise ValueError(f"image {name!r} cannot be read as a picture: {in_a_line(error)}") from error
        raise ValueError(
            f"image {name!r} is no file, no URL (http:// or https://) and no base64 of a picture: pass one of them"
        ) from error


def in_a_line(error):
    """The kind of an error and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"


def pixel_values_of(processor, image):
    """What the image processor makes of one picture: fp32 [1, 3, height, width]."""
    image = load_picture(image)
    if not is_valid_image(image):
        raise ValueError(f"image is a {type(image).__name__}: pass a picture, its path, its URL, or base64 of it")
    try:
        pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values
    except Exception as error:
        raise ValueError(f"image cannot be read as a picture: {in_a_line(error)}") from error
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
