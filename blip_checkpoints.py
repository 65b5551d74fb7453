"""Which models notebooks and commands run on: the bundled ones, or what ``BLIP_MODEL`` and ``RESNET_MODEL`` name."""

import contextlib
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from inf2 import hash_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipForQuestionAnswering,
    BlipProcessor,
    ResNetForImageClassification,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.utils import logging as transformers_logging

from blip_pictures import resize_image

MODELS = Path(__file__).parent / "models"


def uses_bundled_models():
    """Whether the notebooks run on this repository's own models: only of them are accuracies asserted."""
    return not (os.environ.get("BLIP_MODEL") or os.environ.get("RESNET_MODEL"))


def question_count(most=1000):
    """How many questions to ask: what ``QUESTIONS`` in the environment says, else 1,000 (20 for another checkpoint)."""
    given = os.environ.get("QUESTIONS") or ("1000" if uses_bundled_models() else "20")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"QUESTIONS is {given!r} in the environment: give a number, 20 or more")
    return min(most, int(given))


def load_config(source):
    """The configuration of a checkpoint, which says what it is; a directory that does not exist is a `ValueError`."""
    check_source(source)
    return AutoConfig.from_pretrained(source)


def check_source(source):
    """A directory that does not exist is a `ValueError`: it would be taken for a hub name."""
    path = Path(source)
    if not path.exists() and (path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(f"{source} does not exist: pass a directory or a hub name")


def load_pretrained(model_class, source):
    """Load in fp32 and eval mode, as ordinary tensors even under inference mode, and without a word on stderr.

    Transformers fills weights that a checkpoint lacks with random numbers: here that is a `ValueError`."""
    architectures = load_config(source).architectures or [model_class.__name__]
    if model_class.__name__ not in architectures:
        raise ValueError(f"{source} is a {', '.join(architectures)}: pass a {model_class.__name__}")
    with quiet(), torch.inference_mode(False):
        try:
            model, found = model_class.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (SafetensorError, UnpicklingError, LookupError, EOFError, RuntimeError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"the weights of {source} cannot be read ({type(error).__name__}: {first}): copy them again, or save "
                "them with save_pretrained()"
            ) from error
    check_weights(model_class.__name__, source, found)
    return model.eval()


@contextlib.contextmanager
def quiet():
    """Without transformers' bars and reports."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def check_weights(kind, source, found):
    """Raise a `ValueError` unless a checkpoint has the weights of a `kind`, of their sizes, and no others.

    `found` is what ``output_loading_info`` gives. It leaves out what transformers ties or generates; the counters of
    a batch norm, which old checkpoints lack, act in training alone."""

    def some(names):
        return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

    missing = sorted(name for name in found["missing_keys"] if not name.endswith("num_batches_tracked"))
    others = sorted(found["unexpected_keys"])
    sizes = [f"{name} is {list(its)}, not {list(ours)}" for name, its, ours in sorted(found["mismatched_keys"])]
    wrong = [f"lacks {len(missing)} weights of a {kind} {some(missing)}"] if missing else []
    wrong += [f"has {len(others)} others {some(others)}"] if others else []
    wrong += [f"has {len(sizes)} of another size {some(sizes)}"] if sizes else []
    if wrong:
        remedy = f"save it with save_pretrained() of the {kind} itself, not of what wraps it"
        raise ValueError(f"{source} {' and '.join(wrong)}: {remedy}")


def check_traced_from(directory, manifest, parts, name):
    """Raise a `ValueError` unless an artifact was traced from the weights of `parts`, those of the model `name`."""
    for part, (module, _) in parts.items():
        traced = manifest["parts"].get(part)
        if traced is None or hash_weights(module) != traced["weights"]:
            raise ValueError(
                f"{directory} was traced from other weights than those of {name}: name its model with --model, a "
                "directory or a hub name"
            )


def load_resnet(source=None):
    """Load an image classifier.

    Parameters
    ----------
    source : str or Path, optional
        A directory or a hub name; by default the environment variable ``RESNET_MODEL``, and without it the small
        model of this repository.

    Returns
    -------
    model : ResNetForImageClassification, fp32, in eval mode
    image_processor : ConvNextImageProcessorPil
    """
    source = source or os.environ.get("RESNET_MODEL") or MODELS / "tiny-resnet"
    model = load_pretrained(ResNetForImageClassification, source)
    return model, ConvNextImageProcessorPil.from_pretrained(source)


def load_blip(source=None, *, processor=None, image_size=None):
    """Load a visual-question-answering model, as Hugging Face made it.

    Parameters
    ----------
    source : str or Path, optional
        A directory or a hub name such as ``Salesforce/blip-vqa-base``; by default the environment variable
        ``BLIP_MODEL``, and without it the small model of this repository.
    processor : str, Path or BlipProcessor, optional
        Where the processor is, or itself; by default beside the model.
    image_size : int, optional
        Another height and width of pictures in pixels than that of the checkpoint: see `resize_image`.

    Returns
    -------
    model : BlipForQuestionAnswering, fp32, in eval mode
    processor : BlipProcessor
        With the Pillow image processor, which needs no torchvision: one checkpoint gives the same pixels everywhere.

    Raises
    ------
    ValueError
        If the checkpoint is of another kind or lacks weights, or an argument is not of the kind described here.
    """
    source = source or os.environ.get("BLIP_MODEL") or MODELS / "tiny-blip-vqa"
    model = load_pretrained(BlipForQuestionAnswering, source)
    processor = source if processor is None else processor
    if isinstance(processor, str | os.PathLike):
        check_source(processor)
        image_processor = BlipImageProcessorPil.from_pretrained(processor)
        processor = BlipProcessor(image_processor, AutoTokenizer.from_pretrained(processor))
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        kind = type(processor).__name__
        raise ValueError(f"processor is a {kind}: pass a BlipProcessor, or a directory or hub name that holds one")
    return (model, processor) if image_size is None else resize_image(model, processor, image_size)
