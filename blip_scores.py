"""How likely answers are: those that were generated, and those of a list, ranked."""

import math

import torch
import torch.nn.functional as F

from blip_decoding import forced_loop
from blip_inputs import ChecksRequests, question_tokens, requests, whole_number

ONE_ROW = {"num_beams": 1, "num_return_sequences": 1}


def probabilities(model, output):
    """The probability of each answer, a float a row: that of its tokens, one after another, [SEP] among them.

    `output` is what ``generate()`` returns with ``return_dict_in_generate`` and ``output_scores``. The sum of
    ``compute_transition_scores(..., normalize_logits=True)`` over an answer is the logarithm; for beams too, without
    their length penalty. The scores are those that tokens were chosen by, after temperature, top-k and the like."""
    scores = model.text_decoder.compute_transition_scores(
        output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=True
    )
    ends = output.sequences[:, -scores.shape[1] :] == model.config.text_config.sep_token_id
    of_the_answer = ends.cumsum(dim=1) - ends.long() == 0  # what fills a row up behind [SEP] is not part of it
    return scores.double().where(of_the_answer, 0.0).sum(dim=1).exp().tolist()


@torch.no_grad()
def rank_answers(model, processor, text, image, candidates, k=128):
    """Rank given answers, as BLIP's authors do (``rank_answer`` in models/blip_vqa.py of salesforce/BLIP).

    The `k` candidates whose first token is likeliest are scored by all of their tokens, [SEP] among them.

    Parameters
    ----------
    model : BlipForQuestionAnswering, or compiled from one (not with greedy=True)
    processor, text, image
        As in `infer`.
    candidates : list of str
        Any number; the compiled model takes so many at once as its decoder has rows.
    k : int
        How many are scored, and returned; 128 as the authors', at most as many as there are.

    Returns
    -------
    list of (str, float)
        For a str; for a list of questions a list of these. Answers and the probability of each, the likeliest first;
        with a ``label_smoothing`` in the configuration the smoothed one, as of the loss.

    Raises
    ------
    ValueError
        If a candidate is empty or longer than the traced answer, or an argument is not of the kind described here.
    """
    if not isinstance(candidates, list | tuple) or not candidates:
        raise ValueError(f"candidates is {candidates!r}: pass a list of one str or more")
    k = min(whole_number("k", k), len(candidates))
    answers = [question_tokens(processor, candidate, "candidate") for candidate in candidates]
    for answer in answers:
        answer[0] = model.config.text_config.bos_token_id
    check_lengths(model, candidates, answers)
    ranked = []
    for inputs in requests(model, processor, text, image, 1):
        logits_of = decoder_of(model, inputs)
        first = logits_of(torch.tensor([answers[0][:2]]))[0, 0].softmax(dim=0)[[answer[1] for answer in answers]]
        # A stable order: of equal ones the first.
        best = first.sort(descending=True, stable=True).indices[:k].tolist()
        losses = losses_of(model, logits_of, [answers[i] for i in best])
        order = losses.sort(stable=True).indices.tolist()
        ranked.append([(candidates[best[i]], math.exp(-losses[i])) for i in order])
    return ranked[0] if isinstance(text, str) else ranked


def check_lengths(model, candidates, answers):
    """Raise a `ValueError` for a candidate that is longer than the decoder's answer."""
    positions = model.config.text_config.max_position_embeddings
    compiled = isinstance(model, ChecksRequests)
    most = model.shapes.answer_length if compiled else positions
    for candidate, answer in zip(candidates, answers, strict=True):
        if len(answer) > most:
            longer = compiled and model.longer("answer_length", len(answer))
            raise ValueError(
                f"candidate {candidate!r} has {len(answer)} tokens; this model takes {most}: {longer or 'shorten it'}"
            )


def decoder_of(model, inputs):
    """A function of answers to one question, int64 [rows, tokens] -> logits fp32 [rows, tokens - 1, V]."""
    if not isinstance(model, ChecksRequests):
        image_embeds = model.vision_model(inputs["pixel_values"])[0]
        features = model.text_encoder(inputs["input_ids"], encoder_hidden_states=image_embeds)[0]
        return lambda answers: model.text_decoder(
            answers, encoder_hidden_states=features.expand(len(answers), -1, -1), use_cache=False
        ).logits[:, :-1]
    images = model.check_images(inputs.get("pixel_values"), inputs.get("image"), False)
    model.check_questions(inputs["input_ids"], len(images), ONE_ROW)
    ids, mask = model.padded(inputs["input_ids"], inputs["attention_mask"])
    features = model.encode_questions(ids, mask, model.normalised(images))

    def logits_of(answers):
        return model.text_decoder.generate(
            answers[:, :1],
            custom_generate=forced_loop,
            answers=answers,
            encoder_hidden_states=features.expand(len(answers), *features.shape[1:]),
            encoder_attention_mask=mask.expand(len(answers), -1),
            pad_token_id=model.config.text_config.pad_token_id,
            **ONE_ROW,
            max_new_tokens=answers.shape[1] - 1,
        )

    return logits_of


def losses_of(model, logits_of, answers):
    """The loss of each answer, a list of int, summed over its tokens: fp64 [answers]."""
    config, losses = model.config.text_config, []
    rows = model.shapes.rows if isinstance(model, ChecksRequests) else 1
    for start in range(0, len(answers), rows):
        some = answers[start : start + rows]
        longest = max(map(len, some))
        ids = torch.tensor([answer + [config.pad_token_id] * (longest - len(answer)) for answer in some])
        targets = torch.tensor([answer[1:] + [-100] * (longest - len(answer)) for answer in some])
        logits = logits_of(ids).double().transpose(1, 2)
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=config.label_smoothing)
        losses.append(each.sum(dim=1))
    return torch.cat(losses)
