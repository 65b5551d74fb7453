"""Example inputs of a BLIP's graphs: those that they are traced on, and those that a check compares."""

import torch
from inf2 import check_module, describe_inputs, state_aliases, state_of


def example_inputs(model, shapes):
    """What the graphs of a BLIP are traced on: a dict of names to tuples of tensors.

    The masks are ragged: no value of theirs may end up in a graph, and a mask of ones is the likeliest to.
    """
    text, vision = model.config.text_config, model.config.vision_config
    longest = text.max_position_embeddings
    if max(shapes.longest_question, shapes.answer_length) > longest:
        raise ValueError(f"{shapes} is longer than the {longest} positions that this checkpoint has: shorten it")

    def zeros(*size):
        return torch.zeros(size, dtype=torch.float32)

    def ragged(rows, length, tokens):
        return (torch.arange(length) < tokens).long().expand(rows, -1)

    def pads(rows, length):
        return torch.full((rows, length), text.pad_token_id)

    rows, Q, A = shapes.rows, shapes.longest_question, shapes.answer_length
    image_embeds = zeros(1, model.vision_model.embeddings.num_positions, vision.hidden_size)
    features = zeros(rows, Q, text.hidden_size)
    position = torch.tensor([1])
    examples = {
        "image": (zeros(1, 3, vision.image_size, vision.image_size),),
        "bytes": (zeros(1, 3, vision.image_size, vision.image_size).byte(),),
        "whole answer": (pads(rows, A), features, ragged(rows, Q, 1), ragged(rows, A, 2), position),
        "last token": (pads(rows, 1), position, torch.arange(rows)),
    }
    for length in shapes.question_lengths:
        questions = pads(shapes.batch_size, length), ragged(shapes.batch_size, length, 1)
        examples[f"question of {length}"] = (*questions, image_embeds)
    return examples


def each_graph_once(parts_of):
    """The parts of several decoders, ``{decoder: parts_to_trace(...)}``, in one dict: each graph once, under its name
    behind that of the first decoder that has it."""
    parts, kinds = {}, set()
    for decoder, parts_of_one in parts_of.items():
        for name, (module, inputs) in parts_of_one.items():
            if (name, type(module)) not in kinds:
                parts[name if name == "vision_model" else f"{decoder} {name}"] = module, inputs
            kinds.add((name, type(module)))
    return parts


def check_parts(parts, vocab_size):
    """Check each of `parts` (see `parts_to_trace`) on examples in which every value differs: yields name, `Checked`.

    Masks are full, of one token, and ragged; positions are the first two and the last; state is overwritten with random
    numbers.
    """
    generator = torch.Generator().manual_seed(0)
    for name, (module, example_inputs) in parts.items():
        state = state_of(module)
        for parameter in state:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 2:  # the question's mask
                parameter.copy_(parameter > 0)
        names = describe_inputs(module, example_inputs)
        longest = state[-1].shape[2] if state else example_inputs[0].shape[-1]  # A, where there is a position
        others = [
            tuple(varied(n, t, at, longest, vocab_size, generator) for n, t in zip(names, example_inputs, strict=True))
            for at in (0, 1, longest - 1)
        ]
        yield name, check_module(module, [example_inputs, *others], input_output_aliases=state_aliases(module))


def varied(name, example, position, longest, vocab_size, generator):
    """Another value for an example input: the position, a mask of its tokens, rows, tokens or numbers."""
    if example.dtype == torch.uint8:
        return torch.randint(256, example.shape, generator=generator, dtype=torch.uint8)
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    if name == "position":
        return torch.full_like(example, position)
    if name.endswith("attention_mask"):  # all ones at the last position; else so many, one less in the other rows
        full = position == longest - 1
        ones = torch.full((len(example), 1), example.shape[-1] if full else position + 1)
        ones[1:] -= int(position == 1)
        return (torch.arange(example.shape[-1]) < ones).to(example.dtype)
    if name == "beam_rows":
        return example.flip(0) if position else torch.zeros_like(example)
    return torch.randint(vocab_size, example.shape, generator=generator)
