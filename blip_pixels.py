"""Pixels on the shortest way to a graph: 8 bits a colour, with the numbers of Hugging Face's image processor."""

import numpy as np
import torch
from PIL import Image
from transformers import BlipImageProcessorPil
from transformers.image_utils import SizeDict

from blip_pictures import load_picture, pixel_values_of, reading_pixels


def resized_pixels(processor, image):
    """What the image processor has of one picture before it rescales it: uint8 [1, 3, height, width], bit for bit.

    `image` is what `blip_pictures.load_picture` takes. Where the processor would convert a Pillow image to RGB and
    resize it, so does this, without the copies between Pillow and numpy on the way; all else (another processor,
    another setting, an array, a tensor) is left to the processor. None where it makes other numbers than 0 to 255,
    such as of an array of fractions: `pixel_values_of` has those.
    """
    image = load_picture(image)
    if resizes_alone(processor.image_processor, image):
        size = processor.image_processor.size
        with reading_pixels():
            resized = as_rgb(image).resize((size.width, size.height), processor.image_processor.resample)
        # numpy copies in this thread; torch would wake its pool for it, and wait where another process has the core.
        return torch.from_numpy(np.stack([np.asarray(band) for band in resized.split()])[None])
    pixels = pixel_values_of(processor, image, do_rescale=False, do_normalize=False)
    whole = pixels.to(torch.uint8)
    return whole if torch.equal(whole.to(pixels.dtype), pixels) else None


def resizes_alone(image_processor, image):
    """Whether this processor converts this picture to RGB and resizes it with Pillow, and nothing else."""
    own, size = image_processor, getattr(image_processor, "size", None)
    return (
        isinstance(image, Image.Image)
        and type(own) is BlipImageProcessorPil
        and not any(callable(value) for value in vars(own).values())  # a method that somebody replaced
        and own.do_convert_rgb
        and own.do_resize
        and not own.do_center_crop
        and not own.do_pad
        and isinstance(own.resample, int)
        and isinstance(size, SizeDict)
        and {name for name, value in dict(size).items() if value} == {"height", "width"}
    )


def as_rgb(image):
    """A Pillow image in RGB, what is transparent on white: ``convert_to_rgb`` of transformers.image_transforms."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def mean_std_and_factor(processor):
    """What the image processor rescales and normalises with: three floats, three floats, a float.

    Raises
    ------
    ValueError
        If it leaves out one of both, so that no graph can do it in its place.
    """
    own = processor.image_processor
    for name in ("do_rescale", "do_normalize"):
        if not getattr(own, name, None):
            raise ValueError(
                f"{name} of the image processor is {getattr(own, name, None)!r}; a graph that takes uint8 rescales and "
                "normalises: set it to True, or trace a graph that takes float32"
            )
    mean, std = (
        tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
        for value in (own.image_mean, own.image_std)
    )
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"image_mean is {mean} and image_std {std}: a picture has 3 colours, give 3 numbers each")
    return mean, std, float(own.rescale_factor)


def columns(numbers):
    """A number a colour, as it is applied to pixels: fp32 [3, 1, 1]"""
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1)


def normalised(pixels, mean, std, factor):
    """Rescaled and normalised pixels: uint8 [..., 3, height, width] -> fp32, for a graph as for the host.

    `mean` and `std` are three numbers each, or what `columns` makes of them.

    With PyTorch on a CPU the numbers are those of Hugging Face's image processor on Pillow, bit for bit. It multiplies
    with the factor in fp64, which no NeuronCore has; in fp32 a division by its inverse, 255, rounds the same, and a
    multiplication does not. A compiler that divides by a constant through its inverse is off in the last bit: by up to
    2.4e-7 with the usual means and deviations.
    """
    mean, std = (columns(value) if isinstance(value, tuple | list) else value for value in (mean, std))
    return (pixels.to(torch.float32) / (1 / factor) - mean) / std
