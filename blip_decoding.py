"""What keeps decoding safe: turns at a graph's one state, and a loop that feeds given answers."""

import contextlib
import functools
import threading

import torch
from inf2 import Owner


class OnTheHost:
    """Of a module whose inputs come from and outputs go to the CPU, wherever its graphs run.

    Its graphs are as they were traced: what would move, convert, copy or train them is a `ValueError`."""

    @property
    def device(self):
        """The CPU."""
        return torch.device("cpu")

    def _apply(self, fn, recurse=True):
        """Behind ``to()``, ``half()``, ``cuda()`` and the like: what would change fp32 on the CPU is refused."""
        try:
            probe = fn(torch.zeros(1, device="cpu"))
            where = f"{probe.dtype} on {probe.device}".removeprefix("torch.")
        except Exception as error:  # such as a device that is not there
            where = str(error).partition("\n")[0]
        if where != "float32 on cpu":
            raise ValueError(
                f"a compiled model takes float32 on the CPU and cannot be moved or converted ({where}): trace "
                "the original with dtype=torch.bfloat16, or choose a NeuronCore with from_pretrained(directory, core=n)"
            )
        return self

    def train(self, mode=True):
        """Eval mode it is in; training mode is refused."""
        if mode:
            raise ValueError("a compiled model cannot be trained: train the original, and trace it again")
        return super().train(False)

    def __reduce_ex__(self, protocol):
        raise ValueError(
            "a compiled model cannot be copied or pickled, its graphs have a state of their own: load another with "
            "from_pretrained(directory), or several with load_replicas(directory, n)"
        )

    def _traced_already(self, *args, **kwargs):
        raise ValueError(
            "the weights of a compiled model are in its graphs: change, save or push the original and trace it again; "
            "the directory that trace() filled is what from_pretrained() loads, and may be copied"
        )

    save_pretrained = push_to_hub = state_dict = load_state_dict = resize_token_embeddings = _traced_already


def on_the_host(method):
    """A method that makes its tensors on the CPU, whatever ``torch.set_default_device`` says."""

    @functools.wraps(method)
    def on_the_cpu(*args, **kwargs):
        elsewhere = torch.get_default_device().type != "cpu"
        with torch.device("cpu") if elsewhere else contextlib.nullcontext():
            return method(*args, **kwargs)

    return on_the_cpu


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


def forced_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, answers=None, **kwargs):
    """A loop for ``custom_generate`` that feeds given answers, int64 [rows, tokens] with their start token, and returns
    the logits of every token but the start, fp32 [rows, tokens - 1, V]."""
    steps = [answers[:, :length] for length in range(1, answers.shape[1])]
    return torch.stack([model(**model.prepare_inputs_for_generation(s, **kwargs)).logits[:, -1] for s in steps], dim=1)
