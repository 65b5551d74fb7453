"""Whether the modules that are traced answer as the model does, with its hooks, adapters and patched methods."""

import copy

import torch
import torch.nn.functional as F
from inf2 import KeepState, Part, relative_difference, state_aliases, state_of
from transformers import GenerationConfig

BOUND = 1e-4  # of the largest value; what is summed in another order differs by some millionths


class Probes:
    """Inputs of each part of a BLIP, the same ones whenever they are drawn, and what its own modules answer to them.

    Parameters
    ----------
    model : BlipForQuestionAnswering
    shapes : BlipShapes
    pixels : Pixels
    unrolled : bool
        Whether there are graphs that answer in one call.

    Attributes
    ----------
    answers : dict of str to list of Tensor
        For ``vision_model`` image tokens [1, T, D], for ``text_encoder`` features [1, q, D] of questions from one token
        to Q, for ``text_decoder`` logits [1, A - 1, V] at every position of given answers. For ``unrolled_answer`` and
        ``picture_answer`` logits [1, K, V] of the answers to these questions, 0 behind their end.

    Raises
    ------
    ValueError
        If ``generate()`` of the model makes something else of its three parts than Hugging Face's.
    """

    def __init__(self, model, shapes, pixels, unrolled):
        self.model, self.shapes = without_settings(model), shapes
        text, vision = model.config.text_config, model.config.vision_config
        # Each kind has numbers of its own: other shapes of one part are no other probes of another.
        see, ask, feel, say = (torch.Generator().manual_seed(seed) for seed in range(4))
        picture = torch.randn(1, 3, vision.image_size, vision.image_size, generator=see)
        self.pictures = [picture, -picture]
        tokens = 1, model.vision_model.embeddings.num_positions, vision.hidden_size
        self.image_embeds = torch.randn(tokens, generator=ask)
        lengths = {1} | {n for length in shapes.question_lengths for n in (length // 2, length) if n}
        self.questions = [torch.randint(text.vocab_size, (1, n), generator=ask) for n in sorted(lengths)]
        lengths = sorted({1, max(1, shapes.longest_question // 2), shapes.longest_question})
        self.features = [torch.randn(1, n, text.hidden_size, generator=feel) for n in lengths]
        ends = {text.sep_token_id, text.eos_token_id, text.pad_token_id, text.bos_token_id}
        words = torch.tensor([token for token in range(text.vocab_size) if token not in ends])
        size = len(self.features), shapes.answer_length - 1
        self.tokens = words[torch.randint(len(words), size, generator=say)]
        self.answers = {
            "vision_model": [self._see(picture) for picture in self.pictures],
            "text_encoder": [self._encode(question, self.image_embeds) for question in self.questions],
            "text_decoder": [self._decode(*pair) for pair in zip(self.features, self.tokens, strict=True)],
        }
        if unrolled:
            self.bytes = torch.randint(256, picture.shape, generator=see, dtype=torch.uint8)
            seen = {"unrolled_answer": self.image_embeds, "picture_answer": self._see(pixels.normalise(self.bytes))}
            self.answers |= {name: [self._answer(q, embeds) for q in self.questions] for name, embeds in seen.items()}
        self._check_generate()

    def _see(self, picture):
        return self.model.vision_model(pixel_values=picture, interpolate_pos_encoding=False)[0]

    def _encode(self, question, image_embeds):
        return self.model.text_encoder(
            input_ids=question,
            attention_mask=torch.ones_like(question),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long),
            return_dict=False,
        )[0]

    def _generate(self, features, tokens, **how):
        """What Hugging Face's own ``generate()`` makes of features [1, q, D] in at most so many tokens."""
        text = self.model.config.text_config
        return self.model.text_decoder.generate(
            input_ids=torch.full((1, 1), text.bos_token_id),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long),
            max_new_tokens=tokens,
            **_PLAINLY,
            **how,
        )

    def _decode(self, features, tokens):
        """Logits [1, tokens, V] where it is led along `tokens`."""
        lead = {"prefix_allowed_tokens_fn": lambda row, so_far: tokens[len(so_far) - 1 :][:1].tolist()}
        made = self._generate(features, len(tokens), **lead)
        if made.sequences[0, 1:].tolist() != tokens.tolist():
            raise ValueError(f"text_decoder: its generate() returns other tokens than it is led along: {REMEDY}")
        return torch.stack(made.logits, dim=1)

    def _answer(self, question, image_embeds):
        """Logits [1, K, V] of up to K tokens that it chooses itself."""
        steps = self.shapes.unrolled_steps
        logits = torch.stack(self._generate(self._encode(question, image_embeds), steps).logits, dim=1)
        return F.pad(logits, (0, 0, 0, steps - logits.shape[1]))

    def _check_generate(self):
        question, picture = self.questions[-1], self.pictures[0]
        most = min(3, self.shapes.answer_length - 1)
        whole = self.model.generate(question, picture, torch.ones_like(question), **_PLAINLY, max_new_tokens=most)
        parts = self._generate(self._encode(question, self._see(picture)), most)
        pairs = [(whole.sequences, parts.sequences, "")]
        pairs += [(*scores, "") for scores in zip(whole.scores, parts.scores, strict=False)]
        compare("generate", pairs, "its three parts, one after another,")

    def of_vision_model(self, graph):
        """Yields what an image graph answers, what the model does, and words that say to what."""
        for picture, own in zip(self.pictures, self.answers["vision_model"], strict=True):
            yield graph(picture), own, ""

    def of_text_encoder(self, graph, example, for_decoder):
        """As `of_vision_model`, of a question graph traced for questions such as `example`, int64 [B, length].

        Different questions go together, as far as there are, so that none may change another's answer.
        """
        for i, ours in self._asked(graph, example, self.image_embeds):
            tokens, own = self.questions[i].shape[1], for_decoder(self.answers["text_encoder"][i])[0]
            yield ours.narrow(-2, 0, tokens), own, f" for a question of {tokens} tokens"

    def of_answer(self, name, graph, example):
        """As `of_text_encoder`, of a graph that returns tokens: each has to be as good as the best, if not the same."""
        image = self.image_embeds if name == "unrolled_answer" else self.bytes
        for i, tokens in self._asked(graph, example, image):
            for step, (token, own) in enumerate(zip(tokens, self.answers[name][i][0], strict=True)):
                yield own[token], own.max(), f" at position {step}"
                if token != own.argmax() or token == self.model.config.text_config.sep_token_id:
                    break

    def _asked(self, graph, example, image):
        """Yields the number of each question that fits, and its row of what a graph answers about `image`."""
        rows, length = example.shape
        asked = [i for i, question in enumerate(self.questions) if question.shape[1] <= length]
        for start in range(0, len(asked), rows):
            batch = [asked[(start + row) % len(asked)] for row in range(rows)]
            lengths = [self.questions[i].shape[1] for i in batch]
            padded = [F.pad(self.questions[i], (0, length - n)) for i, n in zip(batch, lengths, strict=True)]
            mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
            yield from zip(batch, graph(torch.cat(padded), mask, image), strict=True)

    def of_text_decoder(self, decoder, for_decoder, cache):
        """As `of_vision_model`, of what stands in for the text decoder, at each position of an answer."""
        start = self.model.config.text_config.bos_token_id
        for batch in torch.arange(len(self.features)).split(self.shapes.rows):
            tokens = F.pad(self.tokens[batch], (1, 0), value=start)
            given = [self.features[i] for i in batch]
            mask = torch.arange(self.shapes.longest_question) < torch.tensor([[f.shape[1]] for f in given])
            padded = [F.pad(for_decoder(f), (0, 0, 0, mask.shape[1] - f.shape[1])) for f in given]
            inputs = {"encoder_hidden_states": torch.cat(padded), "encoder_attention_mask": mask.long()}
            inputs |= {"cache": cache(len(batch))}
            for position in range(self.shapes.answer_length - 1):
                so_far = tokens[:, : position + 1]
                ours = decoder(**decoder.prepare_inputs_for_generation(so_far, **inputs)).logits[:, -1]
                own = torch.cat([self.answers["text_decoder"][i][:, position] for i in batch])
                yield ours, own, f" at position {position}"


def without_settings(model):
    """A model of the same modules, hooks and patched methods, whose text decoder has no generation settings."""
    plain, decoder = copy.copy(model), copy.copy(model.text_decoder)
    decoder.generation_config = GenerationConfig()
    plain._modules = {**model._modules, "text_decoder": decoder}
    return plain


def probed_parts(model, shapes, parts, generator, cache, pixels):
    """The parts of a BLIP as `trace_parts` takes them, each with the model's own answers and a check against them.

    `parts` is what `parts_to_trace` returned with `pixels`. `generator` makes of a decoder, or its graph, what stands
    in for the text decoder, and `cache` of a number of rows what its ``generate()`` begins with.
    """
    probes = Probes(model, shapes, pixels, "unrolled_answer" in parts)
    encoder = next(module for name, (module, _) in parts.items() if name.startswith("text_encoder"))
    for_decoder = getattr(encoder, "keys_and_values", lambda features: features)

    def check_of(name, module, example):
        def check(graph):
            if name == "vision_model":
                pairs = probes.of_vision_model(graph)
            elif name in ("unrolled_answer", "picture_answer"):
                pairs = probes.of_answer(name, graph, example)
            elif name != "text_decoder":
                pairs = probes.of_text_encoder(graph, example, for_decoder)
            else:
                keeping = KeepState(graph, state_aliases(graph)) if state_of(graph) else graph  # as a traced one does
                pairs = probes.of_text_decoder(generator(keeping), for_decoder, cache)
            try:
                compare(name, pairs, "the model's own modules")
            except (AttributeError, LookupError, RuntimeError, TypeError) as error:
                raise ValueError(f"{name} {CANNOT}: {type(error).__name__}: {error}") from error
            for parameter in state_of(graph):
                parameter.zero_()

        return check

    answers = {**probes.answers, "text_encoder": [for_decoder(own) for own in probes.answers["text_encoder"]]}
    return {
        name: Part(
            module,
            inputs,
            state_aliases(module),
            answers.get(name, answers["text_encoder"]),
            check_of(name, module, inputs[0]),
        )
        for name, (module, inputs) in parts.items()
    }


REMEDY = "fold it into the weights, or remove it"
CANNOT = (
    "cannot be called as it is traced, because of a hook, an adapter, or a layer that was wrapped or patched; " + REMEDY
)


def compare(name, pairs, other):
    """Raise a `ValueError` where one of `pairs` (ours, theirs, words that say where) differs."""
    for ours, own, what in pairs:
        difference = relative_difference(ours, own)
        if not difference <= BOUND:
            raise ValueError(
                f"{name}: what is traced differs from {other} by {difference:.0e} of the largest value{what}: a hook, "
                f"an adapter or a patched method acts where a trace does not keep it; {REMEDY}"
            )


# What generate() is asked with: its logits, before and after its own processors, and one row a question.
_PLAINLY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
}
