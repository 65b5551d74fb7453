"""What keeps decoding safe: turns at a graph's one state, and a loop for a graph that chooses tokens itself."""

import threading

import torch
from inf2 import Owner
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode


class OnTheHost:
    """Of a module whose inputs come from and outputs go to the CPU, wherever its graphs run."""

    @property
    def device(self):
        """The CPU."""
        return torch.device("cpu")


class TakesTurns:
    """Of something that generates: calls from several threads take turns, each beginning with a start token.

    A subclass has ``generate_in_turn``. Other processes are refused: a fork would share the state but not the turns,
    and wait for ever for one that a thread of its parent had.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._owner = Owner()
        self._turn, self._answering = threading.RLock(), False

    @torch.no_grad()
    def generate(self, input_ids, **kwargs):
        """As ``GenerationMixin.generate`` from a start token, int64 [rows, 1].

        Raises
        ------
        ValueError
            If the answer is to begin with more than a start token.
        RuntimeError
            In a call from inside a call, and in another process than the one that loaded the model.
        """
        self._owner.check()
        if input_ids.shape[1] != 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens; a cached decoder begins with one, the start token: trace "
                "the model with decoder='padded' to go on from more"
            )
        with self._turn:
            if self._answering:
                raise RuntimeError(
                    "generate() was called from inside generate(), whose state it would overwrite: load a model for "
                    "each, with load_replicas()"
                )
            self._answering = True
            try:
                return self.generate_in_turn(input_ids, **kwargs)
            finally:
                self._answering = False


def greedy_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, chosen_to=None, **kwargs):
    """A loop for ``custom_generate`` around a graph that has chosen the token already."""
    needs = [type(processor).__name__ for processor in logits_processor]
    if generation_config.get_generation_mode() != GenerationMode.GREEDY_SEARCH:
        needs.append(str(generation_config.get_generation_mode().value))
    needs += [name for name in ("output_scores", "output_logits") if getattr(generation_config, name)]
    if needs:
        raise ValueError(
            f"{', '.join(needs)}: that takes logits, and this decoder returns the chosen token alone: trace the model "
            "with greedy=False"
        )
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    while unfinished.any():
        chosen = model(**model.prepare_inputs_for_generation(input_ids, **kwargs)).logits[:, -1]
        chosen = chosen.where(unfinished, generation_config.pad_token_id)
        if chosen_to is not None:
            chosen_to.put(chosen)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    if chosen_to is not None:
        chosen_to.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids)
    return input_ids
