"""Two answers to one question, and how far they lie apart."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verified:
    """One question, answered by a model and by what was compiled from it.

    Attributes
    ----------
    example : object
        What was asked.
    expected, actual : list of int
        Token ids of the model's answer and of the compiled one's; a list of such lists for several returned sequences.
    difference : float
        The largest of the logits, over the steps up to the first different token.
    cut : bool
        Whether the compiled answer ended without [SEP] at the traced length, which is what limited it.
    """

    example: object
    expected: list
    actual: list
    difference: float
    cut: bool = False

    @property
    def answers(self):
        """What the compiled model answered: always a list of lists."""
        return self.actual if isinstance(self.actual[0], list) else [self.actual]


def compare_answers(example, expected, actual, logits, sep_token_id):
    """A `Verified` of one question.

    `expected` is what ``generate()`` returned for it alone, with logits; `actual` int64 [returned sequences, tokens] of
    the compiled model, and `logits` a tensor [rows, V] a step.
    """
    difference = worst_difference(expected.logits, logits, expected.sequences[0], actual[0])
    both = [[trim(token_ids, sep_token_id) for token_ids in answers] for answers in (expected.sequences, actual)]
    return Verified(example, *(answers if len(answers) > 1 else answers[0] for answers in both), difference)


def worst_difference(expected, actual, theirs, ours):
    """Of logits, a tensor [rows, V] a step, up to the first token that differs."""
    worst = 0.0
    # A beam search may go on for steps that the sequence it returns does not have.
    for step in range(min(len(theirs), len(ours)) - 1):
        difference = (actual[step] - expected[step]).abs().max().item()
        worst = worst if difference <= worst else difference  # a NaN stays one
        if ours[step + 1] != theirs[step + 1]:
            break
    return worst


def trim(token_ids, sep_token_id):
    """int64 [tokens] -> list of int, up to the first [SEP]: without what fills a row up in a batch of longer ones.

    That is padding, but [SEP] again after a beam search of transformers 5 where the id of [PAD] is 0.
    """
    token_ids = token_ids.tolist()
    return token_ids[: token_ids.index(sep_token_id) + 1] if sep_token_id in token_ids else token_ids
