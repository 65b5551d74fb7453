"""Notebook 05: a decoder with a cache, encoded images, every way to generate, several question lengths, rounding."""

import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    LAYER,
    TINY_SHAPES,
    WORDS,
    answer_eagerly,
    cut,
    make_pixels,
    make_questions,
    make_tiny_blip,
    pad,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blip_helpers import (
    MODELS,
    BlipShapes,
    CachedDecoder,
    ImitatedAutoCast,
    NeuronBlipForQuestionAnswering,
    VisionModelWrapper,
    acting_question_mask,
    check_close,
    count_cost,
    infer,
    load_blip,
    load_replicas,
    neuron_compiler_args,
    parts_to_trace,
    read_manifest,
    state_aliases,
    trace,
    trace_module,
)
from models.make_base import make_model
from models.scenes import examples

SEP = WORDS.index("[SEP]")
LIMIT = {"max_new_tokens": TINY_SHAPES.answer_length - 1}
LENGTHS = [3, 9, 6, 10, 2, 5]


def refused(message):
    return pytest.raises(ValueError, match=message)


def generate_eagerly(model, ids, mask, pixels, **generate_kwargs):
    """Hugging Face's generate() for several padded questions, with a mask that acts in encoder and decoder."""
    with acting_question_mask(model), torch.no_grad():
        image_embeds = model.vision_model(pixels)[0]
        features = model.text_encoder(ids, mask, encoder_hidden_states=image_embeds)[0]
        return model.text_decoder.generate(
            input_ids=torch.full((len(ids), 1), model.decoder_start_token_id),
            eos_token_id=model.config.text_config.sep_token_id,
            pad_token_id=model.config.text_config.pad_token_id,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
            **LIMIT | generate_kwargs,
        )


@pytest.fixture(scope="module")
def unrolled(tiny, tmp_path_factory):
    return trace(tiny, tmp_path_factory.mktemp("unrolled"), TINY_SHAPES, decoder="unrolled")


@pytest.fixture(scope="module")
def cached(traced_directory):
    return NeuronBlipForQuestionAnswering.from_pretrained(traced_directory)


# Every way to generate


class StopAfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] == 4)


WAYS = {
    "greedy": (6, {}),
    "two beams": (3, {"num_beams": 2}),
    "three beams": (2, {"num_beams": 3}),
    "four beams": (1, {"num_beams": 4}),
    "five beams": (1, {"num_beams": 5}),
    "beams, several returned": (2, {"num_beams": 3, "num_return_sequences": 2}),
    "beams, early stopping": (2, {"num_beams": 3, "early_stopping": True}),
    "beams, length penalty": (2, {"num_beams": 3, "length_penalty": 2.0}),
    "sampling": (6, {"do_sample": True}),
    "sampling, several returned": (2, {"do_sample": True, "num_return_sequences": 3}),
    "sampling, top-k, top-p": (5, {"do_sample": True, "top_k": 9, "top_p": 0.9, "temperature": 2.0}),
    "beam sampling": (3, {"do_sample": True, "num_beams": 2}),
    "at least five tokens": (6, {"min_new_tokens": 5}),
    "repetition penalty": (6, {"repetition_penalty": 1.7}),
    "no repeated pairs": (6, {"no_repeat_ngram_size": 2}),
    "stopping criteria": (6, {"stopping_criteria": [StopAfterThree()]}),
    "beams, at least five": (3, {"num_beams": 2, "min_new_tokens": 5, "repetition_penalty": 1.3}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_equals_eager(compiled, tiny, way):
    questions, settings = WAYS[way]
    settings = settings | {"return_dict_in_generate": True, "output_scores": True}
    ids, mask = pad(make_questions(LENGTHS[:questions], seed=3))
    pixels = make_pixels(questions, seed=4)
    torch.manual_seed(5)
    expected = generate_eagerly(tiny, ids, mask, pixels, **settings)
    torch.manual_seed(5)
    actual = compiled.generate(ids, pixels, mask, **settings)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(actual.scores) == len(expected.scores)
    for ours, theirs in zip(actual.scores, expected.scores, strict=True):
        finite = theirs.isfinite() & (theirs > -1e8)  # beams that must not be chosen are at -1e9
        torch.testing.assert_close(ours[finite], theirs[finite], atol=1e-4, rtol=0)


class Recorder(TextStreamer):
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token(compiled, unrolled):
    for model in (compiled, unrolled):
        (question,), recorder = make_questions([6]), Recorder()
        answer = model.generate(question, make_pixels(1), streamer=recorder)
        assert recorder.heard == answer[0].tolist() and recorder.ended


def test_ragged_questions_get_their_own_unpadded_answers(compiled, tiny):
    questions, pixels = make_questions(LENGTHS, seed=7), make_pixels(6, seed=8)
    ids, mask = pad(questions)
    assert cut(compiled.generate(ids, pixels, mask)) == cut(answer_eagerly(tiny, questions, pixels, **LIMIT))


# State


def poison(model, value):
    state = CachedDecoder(make_tiny_blip().text_decoder, TINY_SHAPES).state
    with torch.no_grad():
        for parameter, like in zip(list(model.text_decoder.decoder.parameters())[: len(state)], state, strict=True):
            assert parameter.shape == like.shape
            parameter.fill_(value)


@pytest.mark.parametrize("kind", ["cached", "unrolled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_an_answer_depends_on_no_earlier_call(request, tiny, kind, value):
    model, questions = request.getfixturevalue(kind), make_questions([5, 8], seed=9)
    ids, mask = pad(questions)
    poison(model, value)
    actual = cut(model.generate(ids, make_pixels(2), mask))
    assert actual == cut(answer_eagerly(tiny, questions, make_pixels(2), **LIMIT))


def test_an_interrupted_answer_does_no_harm(cached, tiny):
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    (question,) = make_questions([5])
    with pytest.raises(KeyboardInterrupt):
        cached.generate(question, make_pixels(1), stopping_criteria=[Interrupt()])
    assert cut(cached.generate(question, make_pixels(1))) == cut(
        answer_eagerly(tiny, [question], make_pixels(1), **LIMIT)
    )


def test_the_state_holds_what_was_asked(cached, tiny):
    """Keys of the answer so far in the first slots, nothing beyond."""
    (question,) = make_questions([7])
    answer = cached.generate(question, make_pixels(1), max_new_tokens=4, min_new_tokens=4)
    layers = LAYER["num_hidden_layers"]
    keys = list(cached.text_decoder.decoder.parameters())[2 * layers + 1][0]
    assert answer.shape[1] == 5  # the last token was never fed back
    assert (keys[:, :4].abs().sum(dim=(0, 2)) > 0).all() and not keys[:, 4:].any()


def test_threads_take_turns(cached, tiny):
    questions, pixels = make_questions([4, 9, 6, 2], seed=11), make_pixels(4, seed=12)
    expected = cut(answer_eagerly(tiny, questions, pixels, **LIMIT))

    def ask(i):
        return [cut(cached.generate(questions[i], pixels[i : i + 1]))[0] for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(ask, range(4))] == [[answer] * 5 for answer in expected]


def test_a_call_inside_a_call_is_an_error_that_names_replicas(cached, tiny):
    class AskAgain(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            cached.generate(*make_questions([3]), make_pixels(1))

    with pytest.raises(RuntimeError, match="load_replicas"):
        cached.generate(*make_questions([5]), make_pixels(1), stopping_criteria=[AskAgain()])
    questions = make_questions([5])
    answer = cut(cached.generate(questions[0], make_pixels(1)))
    assert answer == cut(answer_eagerly(tiny, questions, make_pixels(1), **LIMIT))


def test_replicas_have_states_of_their_own(traced_directory, tiny):
    one, other = load_replicas(traced_directory, 2)
    questions, pixels, second = make_questions([5, 5], seed=13), make_pixels(2), []

    class AskTheOther(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            second.append(cut(other.generate(questions[1], pixels[1:]))[0])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    first = cut(one.generate(questions[0], pixels[:1], stopping_criteria=[AskTheOther()]))[0]
    expected = cut(answer_eagerly(tiny, questions, pixels, **LIMIT))
    assert [first, *second] == [expected[0], *[expected[1]] * len(second)] and second


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_a_number_of_replicas_that_is_none_is_a_value_error(traced_directory, n):
    with refused("n is"):
        load_replicas(traced_directory, n)


def test_an_answer_that_begins_with_more_than_a_start_token_is_a_value_error(cached):
    features = torch.zeros(1, 4, 4, TINY_SHAPES.question_length, 8)
    with refused("input_ids has 3 tokens.*decoder='padded'"):
        cached.text_decoder.generate(torch.tensor([[48, 5, 6]]), encoder_hidden_states=features)


# Settings of the model's own


@pytest.fixture
def own_settings(compiled, monkeypatch):
    """A compiled model whose text decoder has generation settings of its own."""

    def with_settings(**settings):
        values = compiled.text_decoder.generation_config.to_dict() | settings
        monkeypatch.setattr(compiled.text_decoder, "generation_config", GenerationConfig.from_dict(values))
        return compiled

    return with_settings


@pytest.mark.parametrize(
    ("own", "asked", "tokens"),
    [
        ({"max_new_tokens": 15}, {"max_length": 5}, 4),
        ({"max_new_tokens": 15}, {"generation_config": GenerationConfig(max_length=5)}, 4),
        ({"max_new_tokens": 15}, {}, TINY_SHAPES.answer_length - 1),
        ({"max_length": 20}, {}, TINY_SHAPES.answer_length - 1),
        ({"max_new_tokens": 3}, {}, 3),
        ({"max_new_tokens": 3}, {"max_new_tokens": 5}, 5),
        ({}, {"max_length": 4}, 3),
    ],
)
def test_no_settings_lead_beyond_the_traced_length(own_settings, own, asked, tokens):
    model = own_settings(**own)
    ids, mask = pad(make_questions(LENGTHS, seed=20))
    answers = model.generate(ids, make_pixels(6), mask, min_new_tokens=tokens, **asked)
    assert answers.shape[1] == 1 + tokens


def test_rows_of_the_models_own_settings_count(own_settings, processor):
    from PIL import Image

    model, picture = own_settings(num_beams=2, num_return_sequences=2), Image.new("RGB", (40, 30), "red")
    ids, mask = pad(make_questions([4, 6]))
    settings = {"generation_config": GenerationConfig(max_new_tokens=5)}
    assert len(model.generate(ids, make_pixels(2), mask, **settings)) == 4
    with refused("4 questions with 2 rows each"):
        model.generate(*pad(make_questions([4] * 4))[:1], make_pixels(4), **settings)
    with refused("num_return_sequences > 1"):
        infer(model, processor, ["what is this ?"] * 2, picture)
    with refused("sampling in several calls"):
        infer(
            own_settings(do_sample=True, num_beams=1, num_return_sequences=1),
            processor,
            ["what is this ?"] * 9,
            picture,
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"generation_config": GenerationConfig(output_attentions=True, return_dict_in_generate=True)},
        {"cache": ()},
        {"past_key_values": ()},
        {"custom_generate": "somebody/something"},
    ],
    ids=str,
)
def test_what_no_graph_can_do_is_a_value_error(compiled, unrolled, settings):
    for model in (compiled, unrolled):
        with refused("nothing that a compiled model can do"):
            model.generate(*make_questions([4]), make_pixels(1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": "2"}, "num_beams is '2'"),
        ({"num_return_sequences": -1}, "num_return_sequences is -1"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_length": 1.5}, "max_length is 1.5"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask a list"),
        ({"interpolate_pos_encoding": True}, "interpolate_pos_encoding"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_value_errors(compiled, settings, message):
    image = compiled.encode_image(make_pixels(1))
    with refused(message):
        compiled.generate(*make_questions([4]), image=image, **settings)


# Every argument of generate(): one that equals eager or is refused

TOKENIZER = load_blip(MODELS / "tiny-blip-vqa")[1].tokenizer
EQUAL = {
    **{name: [4] for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k")},
    **{name: [0.3] for name in ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "temperature")},
    **{name: [1.5] for name in ("repetition_penalty", "encoder_repetition_penalty", "length_penalty")},
    **{name: [2] for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")},
    **{name: [True, False] for name in ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")},
    **{name: [True, False] for name in ("output_scores", "output_logits", "return_dict_in_generate", "low_memory")},
    **{name: [5] for name in ("forced_bos_token_id", "forced_eos_token_id", "bos_token_id", "decoder_start_token_id")},
    **{name: [[5, 13]] for name in ("suppress_tokens", "begin_suppress_tokens")},
    **{name: [3] for name in ("num_assistant_tokens", "max_matching_ngram_size")},
    **{name: [3] for name in ("assistant_lookbehind", "target_lookbehind")},
    "assistant_confidence_threshold": [0.4],
    "assistant_ensemble_weight": [0.5],
    "num_assistant_tokens_schedule": ["constant"],
    "speculation_type": ["x"],
    "early_stopping": [True, "never"],
    "max_time": [100.0],
    "num_beams": [1, 2],
    "num_return_sequences": [1],
    "bad_words_ids": [[[13]]],
    "exponential_decay_length_penalty": [(2, 1.5)],
    "sequence_bias": [{(13,): -10.0}],
    "watermarking_config": [WatermarkingConfig()],
    "compile_config": [CompileConfig()],
    "disable_compile": [True],
    "logits_processor": [LogitsProcessorList([SuppressTokensLogitsProcessor([13])])],
    "stopping_criteria": [StoppingCriteriaList([StopAfterThree()])],
    "prefix_allowed_tokens_fn": [lambda batch, ids: [5, 6, 7, 13, 24, 39]],
    "generation_config": [GenerationConfig(max_new_tokens=4), GenerationConfig(num_beams=2, max_new_tokens=5)],
    "streamer": [None],
    "tokenizer": [TOKENIZER],
    "trust_remote_code": [None],
}
REFUSED = {
    "assistant_early_exit": [1],
    "assistant_model": [make_tiny_blip()],
    "cache_config": [{"nbits": 4}],
    "cache_implementation": ["static", "dynamic", "quantized", "offloaded", "paged"],
    "constraints": [[1]],
    "continuous_batching_config": [{"page_size": 8}],
    "custom_generate": ["somebody/something", lambda *args, **kwargs: 0],
    "diversity_penalty": [0.5],
    "dola_layers": ["low"],
    "encoder_attention_mask": [torch.ones(1, 2)],
    "encoder_hidden_states": [torch.zeros(1, 2, 32)],
    "eos_token_id": [3, [3, 5], None],
    "force_words_ids": [[[5]]],
    "generation_config": ["greedy", {"num_beams": 2}],
    "guidance_scale": [1.5],
    "inputs": [torch.tensor([[48]])],
    "is_assistant": [True],
    "max_cache_len": [5],
    "negative_prompt_attention_mask": [torch.ones(1, 1)],
    "negative_prompt_ids": [torch.tensor([[5]])],
    "nonsense": [1],
    "num_beam_groups": [2],
    "num_return_sequences": [0],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "pad_token_id": [0, 5, None],
    "penalty_alpha": [0.5],
    "position_ids": [torch.tensor([[0]])],
    "prefill_chunk_size": [2],
    "prompt_lookup_num_tokens": [2],
    "stop_strings": ["red", ["yes"]],  # without a tokenizer
    "synced_gpus": [True],
    "token_healing": [True],
    "use_mtp": [True],
}


def test_no_argument_of_generate_is_forgotten():
    own = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    method = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert own | method <= EQUAL.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", EQUAL)
def test_an_argument_of_generate_equals_eager(compiled, unrolled, tiny, name):
    questions, pixels = make_questions([6, 8], seed=23), make_pixels(2, seed=23)
    limit = {} if name in ("max_length", "max_new_tokens", "generation_config") else LIMIT
    for value in EQUAL[name]:
        for question, image in zip(questions, pixels, strict=True):
            answers = []
            for model, settings in ((tiny, limit), (compiled, {}), (unrolled, {})):
                torch.manual_seed(6)
                answer = model.generate(question, image[None], **settings, **{name: value})
                answers.append(getattr(answer, "sequences", answer).tolist())
            assert answers == answers[:1] * 3


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_of_generate_that_no_graph_can_do_is_a_value_error(compiled, unrolled, name, monkeypatch):
    if name not in ("nonsense", "stop_strings"):  # transformers refuses these
        monkeypatch.setattr(VisionModelWrapper, "forward", lambda *args: pytest.fail("began to answer"))
    for value in REFUSED[name]:
        for model in (compiled, unrolled):
            with refused(name if name != "stop_strings" else "tokenizer") as error:
                model.generate(*make_questions([4]), make_pixels(1), **{name: value})
            assert "\n" not in str(error.value)


def test_a_tokenizer_stops_every_decoder_at_a_string(tmp_path):
    model, processor = load_blip(MODELS / "tiny-blip-vqa")
    (example,) = (e for e in examples("held-out", 8) if e.kind == "describe")
    inputs = processor(images=example.image, text=example.question, return_tensors="pt")
    settings = {"stop_strings": [" and", "a "], "tokenizer": processor.tokenizer}
    expected = model.generate(**inputs, max_new_tokens=23, **settings)
    assert expected.shape[1] < model.generate(**inputs, max_new_tokens=23).shape[1]
    for how in ({"decoder": "padded"}, {}, {"decoder": "unrolled"}):
        compiled = trace(model, tmp_path / str(how), BlipShapes(), **how)
        assert torch.equal(compiled.generate(**inputs, **settings), expected)


def test_a_streamer_hears_one_answer_at_a_time(compiled, unrolled, processor, tiny):
    from PIL import Image

    picture, texts = Image.new("RGB", (40, 30), "red"), ["what is this ?", "where", "a b c"]
    expected = Recorder()
    infer(tiny, processor, texts, picture, streamer=expected, **LIMIT)
    for model in (compiled, unrolled):
        recorder = Recorder()
        infer(model, processor, texts, picture, streamer=recorder)
        assert recorder.heard == expected.heard
        with refused("a streamer hears one answer at a time, not 2"):
            model.generate(pad(make_questions([4, 6]))[0], make_pixels(1), streamer=recorder)


# What else may be done with a model


KEPT = {
    "to cpu": lambda model: model.to("cpu"),
    "to float32": lambda model: model.to(torch.float32),
    "to device": lambda model: model.to(device=torch.device("cpu"), dtype=torch.float32),
    "cpu": lambda model: model.cpu(),
    "float": lambda model: model.float(),
    "eval": lambda model: model.eval(),
    "train off": lambda model: model.train(False),
}
NEVER = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "save_pretrained": lambda model: model.save_pretrained("nowhere"),
    "push_to_hub": lambda model: model.push_to_hub("nobody/nothing"),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to float16": lambda model: model.to(torch.float16),
    "to meta": lambda model: model.to("meta"),
    "cuda": lambda model: model.cuda(),
    "to cuda": lambda model: model.to("cuda:0"),
    "train": lambda model: model.train(),
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(60),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict(make_tiny_blip().state_dict()),
}


@pytest.mark.parametrize("what", [*KEPT, *NEVER])
def test_a_compiled_model_stays_what_it_is(compiled, unrolled, what):
    for model in (compiled, unrolled):
        asked = make_questions([6])[0], make_pixels(1)
        expected = model.generate(*asked)
        if what in KEPT:
            assert KEPT[what](model) is model
        else:
            for part in (model, model.text_decoder):
                with refused(r"(from_pretrained|the original)") as error:
                    NEVER[what](part)
                assert "\n" not in str(error.value)
        assert torch.equal(model.generate(*asked), expected) and not model.training


def quantised():
    return torch.ao.quantization.quantize_dynamic(make_tiny_blip(), {nn.Linear}, dtype=torch.qint8)


def with_tokens(**tokens):
    model = make_tiny_blip()
    for name, token in tokens.items():
        setattr(model.config.text_config, name, token)
    return model


NOT_TRACED = {
    "quantised": (quantised, "is quantised; float32"),
    "half": (lambda: make_tiny_blip().half(), "float16; float32"),
    "on meta": (lambda: make_tiny_blip().to("meta"), "the model is on meta; it is traced on the CPU"),
    "no pad token": (lambda: with_tokens(pad_token_id=None), "pad_token_id of the text_config is None"),
    "pad token outside": (lambda: with_tokens(pad_token_id=50), "pad_token_id of the text_config is 50; .* 0 to 49"),
    "negative pad token": (lambda: with_tokens(pad_token_id=-1), "pad_token_id of the text_config is -1"),
    "no sep token": (lambda: with_tokens(sep_token_id=None), "sep_token_id of the text_config is None"),
    "sep token outside": (lambda: with_tokens(sep_token_id=102), "sep_token_id of the text_config is 102"),
}


@pytest.mark.parametrize("kind", NOT_TRACED)
def test_a_model_that_cannot_be_traced_is_a_value_error(tmp_path, kind):
    make, message = NOT_TRACED[kind]
    with refused(message):
        trace(make(), tmp_path / "new", TINY_SHAPES)
    assert not (tmp_path / "new").exists()


def test_another_default_device_changes_nothing(tiny, tmp_path):
    questions, pixels = make_questions([6]), make_pixels(1)
    with torch.device("meta"):
        answer = trace(tiny, tmp_path / "new", TINY_SHAPES).generate(questions[0], pixels)
    assert answer.tolist() == answer_eagerly(tiny, questions, pixels, **LIMIT)


def test_an_end_token_that_nobody_reads_does_no_harm(tmp_path):
    model = with_tokens(eos_token_id=102)
    questions, pixels = make_questions([6]), make_pixels(1)
    answer = trace(model, tmp_path, TINY_SHAPES).generate(questions[0], pixels)
    assert answer.tolist() == answer_eagerly(model, questions, pixels, **LIMIT)


def test_infer_gives_texts(compiled, processor):
    image = compiled.encode_image(make_pixels(1))
    with refused("infer gives texts"):
        infer(compiled, processor, "what is this ?", image, return_dict_in_generate=True)
    with refused("pass what encode_image returns"):
        infer(compiled, processor, "what is this ?", BaseModelOutputWithPooling())


def test_a_compiled_model_is_neither_traced_nor_trained(compiled, tmp_path):
    with refused("not compiled"):
        trace(compiled, tmp_path, TINY_SHAPES)
    with pytest.raises(NotImplementedError, match="generate"):
        compiled(input_ids=make_questions([4])[0], pixel_values=make_pixels(1))


def test_another_start_token_is_a_value_error(tmp_path):
    model = make_tiny_blip()
    model.decoder_start_token_id = 20
    with refused("decoder_start_token_id is 20"):
        trace(model, tmp_path, TINY_SHAPES)


# Encoded images


def test_an_encoded_image_answers_as_its_pixels(compiled):
    ids, mask = pad(make_questions(LENGTHS, seed=14))
    for images in (1, 6):
        pixels = make_pixels(images, seed=15)
        image = compiled.encode_image(pixels)
        assert torch.equal(
            compiled.generate(ids, image=image, attention_mask=mask), compiled.generate(ids, pixels, mask)
        )


def test_an_encoded_image_is_not_encoded_again(compiled, monkeypatch):
    image = compiled.encode_image(make_pixels(1))
    monkeypatch.setattr(compiled.vision_model, "forward", lambda *inputs: pytest.fail("encoded again"))
    compiled.generate(*make_questions([4]), image=image)


def test_infer_takes_an_encoded_image(compiled, processor):
    from PIL import Image

    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "navy")]
    encoded = [compiled.encode_image(processor.image_processor(p, return_tensors="pt").pixel_values) for p in pictures]
    questions = ["what is this ?", "how many dots are there ?"] * 5
    assert infer(compiled, processor, questions, encoded[0]) == infer(compiled, processor, questions, pictures[0])
    assert infer(compiled, processor, questions[0], encoded[1]) == infer(compiled, processor, questions[0], pictures[1])
    both = BaseModelOutputWithPooling(last_hidden_state=torch.cat([e.last_hidden_state for e in encoded]))
    assert infer(compiled, processor, questions[:2], both) == infer(compiled, processor, questions[:2], pictures)


def test_an_image_of_the_wrong_kind_is_a_value_error(compiled, tiny, processor):
    ids, mask = pad(make_questions([4, 5]))
    pixels = make_pixels(2)
    image = compiled.encode_image(pixels)
    for arguments, message in (
        ({"image": image, "pixel_values": pixels}, "not both"),
        ({}, "not both"),
        ({"image": pixels}, "encode_image"),
        ({"image": compiled.encode_image(make_pixels(3))}, "3 images for 2 questions"),
        ({"image": BaseModelOutputWithPooling(last_hidden_state=torch.zeros(1, 3, 32))}, "encoder_hidden_states"),
        ({"image": BaseModelOutputWithPooling(last_hidden_state=torch.zeros(5, 32))}, "3 dimensions"),
        ({"image": BaseModelOutputWithPooling(last_hidden_state=image[0].double())}, "float64"),
        ({"image": BaseModelOutputWithPooling(last_hidden_state=image[0].bfloat16())}, "bfloat16"),
    ):
        with refused(message):
            compiled.generate(ids, attention_mask=mask, **arguments)
    with refused("pixel_values is"):
        compiled.encode_image(pixels[0])
    with refused("only a compiled model"):
        infer(tiny, processor, "what is this ?", image)


@pytest.fixture(scope="module")
def full_size():
    """The architecture of blip-vqa-base without its weights: operations can be counted all the same."""
    with torch.device("meta"):
        return make_model().eval()


def test_a_further_question_costs_a_twentieth_of_the_first(full_size):
    def flops(questions):
        shapes = BlipShapes(batch_size=questions, question_length=16, answer_length=5)
        with torch.device("meta"):
            parts = parts_to_trace(full_size, shapes)
            names = "vision_model", "text_encoder", "text_decoder"
            image, question, step = (count_cost(*parts[name]).flops for name in names)
        return image + question + (shapes.answer_length - 1) * step

    first, both = flops(1), flops(2)
    assert first > 1e11 and both - first <= 0.05 * first


@pytest.mark.parametrize("answer_length", [5, 20, 64])
def test_a_decoded_token_costs_little_more_than_its_matrices(full_size, answer_length):
    with torch.device("meta"):
        decoder, inputs = parts_to_trace(full_size, BlipShapes(1, 1, 16, answer_length))["text_decoder"]
        counted = count_cost(decoder, inputs).flops
    matrices = sum(layer.weight.numel() for layer in decoder.modules() if isinstance(layer, torch.nn.Linear))
    assert 2 * matrices <= counted <= 1.05 * 2 * matrices


# Several question lengths


@pytest.fixture(scope="module", params=["padded", "cached"])
def lengths(request, tiny, tmp_path_factory):
    shapes = BlipShapes(batch_size=2, question_length=(10, 4, 6), answer_length=8)
    return trace(tiny, tmp_path_factory.mktemp("lengths"), shapes, decoder=request.param)


def test_the_shortest_question_graph_that_fits_is_used(lengths, tiny, monkeypatch):
    used, graphs = [], lengths.text_encoder.graph.graphs
    for length, graph in zip((4, 6, 10), graphs, strict=True):
        call = graph.forward
        monkeypatch.setattr(graph, "forward", lambda *i, call=call, length=length: used.append(length) or call(*i))
    for tokens in range(1, 11):
        questions, pixels = make_questions([tokens], seed=tokens), make_pixels(1)
        answer = cut(lengths.generate(questions[0], pixels))
        assert answer == cut(answer_eagerly(tiny, questions, pixels, max_new_tokens=7))
    assert used == [4] * 4 + [6] * 2 + [10] * 4


def test_ragged_questions_take_the_graph_of_the_longest(lengths, tiny):
    questions, pixels = make_questions([2, 6], seed=18), make_pixels(1)
    ids, mask = pad(questions)
    expected = cut(answer_eagerly(tiny, questions, pixels.expand(2, -1, -1, -1), max_new_tokens=7))
    assert cut(lengths.generate(ids, pixels, mask)) == expected


def test_several_lengths_share_a_decoder(tiny, tmp_path, capsys):
    trace(tiny, tmp_path, BlipShapes(question_length=10, answer_length=8))
    manifest = trace(tiny, tmp_path, BlipShapes(question_length=(4, 10), answer_length=8)) and read_manifest(tmp_path)
    assert sorted(manifest["parts"]) == ["text_decoder", "text_encoder_10", "text_encoder_4", "vision_model"]
    said = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[1] for line in said] == ["kept", "traced:", "traced:", "kept"]
    with refused("text_encoder_4: text_encoder_4.pt is missing"):
        (tmp_path / "text_encoder_4.pt").unlink()
        NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)


def test_question_lengths_are_put_in_order():
    assert BlipShapes(question_length=[16, 8, 16]) == BlipShapes(question_length=(8, 16))
    assert BlipShapes(question_length=(8,)) == BlipShapes(question_length=8)
    assert hash(BlipShapes(question_length=[8, 16])) == hash(BlipShapes(question_length=(16, 8)))


@pytest.mark.parametrize("lengths", [(), (8, 0), (8, "16"), (8, None), [True], {8, 16}], ids=str)
def test_question_lengths_that_are_none_are_a_value_error(lengths):
    with refused("question_length is"):
        BlipShapes(question_length=lengths)


# Rounding


@pytest.mark.parametrize("kind", ["padded", "cached"])
def test_bf16_is_near_fp32_and_smaller(tiny, tmp_path, kind):
    rounded = trace(tiny, tmp_path, TINY_SHAPES, decoder=kind, dtype=torch.bfloat16)
    ids, mask = pad(make_questions(LENGTHS, seed=19))
    scores = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    actual = rounded.generate(ids, make_pixels(6), mask, **scores).logits[0]
    expected = generate_eagerly(tiny, ids, mask, make_pixels(6), **scores).logits[0]
    difference = (actual - expected).abs().max()
    assert actual.dtype == torch.float32 and 1e-4 < difference < 0.1 * expected.abs().max()
    part = read_manifest(tmp_path)["parts"]["vision_model"]
    assert part["dtype"] == "bfloat16"


def test_bf16_rounds_what_the_compilers_flags_say(tiny):
    flags = neuron_compiler_args("matmult", "bf16")
    for name, (module, inputs) in parts_to_trace(tiny, TINY_SHAPES).items():
        graph = trace_module(
            module, inputs, input_output_aliases=state_aliases(module), backend="cpu", compiler_args=flags
        )
        with ImitatedAutoCast(flags):
            expected = module(*inputs)
        actual, expected, plain = (
            o[0] if isinstance(o, tuple) else o for o in (graph(*inputs), expected, module(*inputs))
        )
        assert actual.dtype == torch.float32 and torch.allclose(actual, expected, atol=1e-5), name
        assert not torch.allclose(actual, plain, atol=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
        ({"dtype": torch.bfloat16, "compiler_args": "--optlevel 1"}, "not both"),
        ({"decoder": "fast"}, "'cached', 'padded' and 'unrolled'"),
    ],
)
def test_arguments_of_trace_that_do_not_fit_are_value_errors(tiny, tmp_path, arguments, message):
    with refused(message):
        trace(tiny, tmp_path / "new", TINY_SHAPES, **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"decoder": "padded"}], ids=str)
def test_another_kind_is_traced_again(tiny, artifact, capsys, change):
    trace(tiny, artifact, TINY_SHAPES, **change)
    said = capsys.readouterr().out
    assert "traced: " in said and ("dtype was float32" in said or "it was a Cached" in said)


# Any small model


@st.composite
def models(draw):
    heads = draw(st.integers(1, 3))
    layer = {
        "hidden_size": 8 * heads * draw(st.integers(1, 2)),
        "intermediate_size": draw(st.sampled_from([8, 24])),
        "num_attention_heads": heads,
    }
    patch = draw(st.sampled_from([4, 8]))
    vocabulary = draw(st.integers(8, 40))
    config = BlipConfig(
        text_config={
            **layer,
            "num_hidden_layers": draw(st.integers(1, 3)),
            "encoder_hidden_size": layer["hidden_size"],
            "vocab_size": vocabulary,
            "max_position_embeddings": 16,
            "bos_token_id": vocabulary - 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            **layer,
            "num_hidden_layers": draw(st.integers(1, 2)),
            "image_size": patch * draw(st.integers(1, 3)),
            "patch_size": patch,
            "initializer_range": 0.5,
        },
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    model = BlipForQuestionAnswering(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) * weight[0].numel() ** -0.5)
    return model


@given(data=st.data(), model=models())
def test_any_small_model_answers_alike(tmp_path_factory, data, model):
    longest = data.draw(st.integers(1, 16), "question length")
    shapes = BlipShapes(
        batch_size=data.draw(st.integers(1, 3), "batch size"),
        num_beams=data.draw(st.integers(1, 2), "beams"),
        question_length=tuple({longest, max(1, longest // 2)}),
        answer_length=data.draw(st.integers(2, 10), "answer length"),
    )
    count = data.draw(st.integers(1, shapes.rows), "questions")
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=count, max_size=count), "tokens")
    vocabulary = model.config.text_config.vocab_size
    questions = [torch.randint(3, vocabulary - 1, (1, length)) for length in lengths]
    size = model.config.vision_config.image_size
    pixels = torch.randn(count, 3, size, size)
    ids, mask = pad(questions)
    limit = {"max_new_tokens": shapes.answer_length - 1, "return_dict_in_generate": True, "output_logits": True}
    alone = [model.generate(q, p[None], **limit) for q, p in zip(questions, pixels, strict=True)]
    for decoder in ("padded", "cached"):
        directory = tmp_path_factory.mktemp(decoder)
        compiled = trace(model, directory, shapes, decoder=decoder)
        for artifact in (compiled, NeuronBlipForQuestionAnswering.from_pretrained(directory)):
            together = artifact.generate(ids, pixels, mask, **limit)
            for row, expected in enumerate(alone):
                tokens = expected.sequences.shape[1]
                assert together.sequences[row, :tokens].tolist() == expected.sequences[0].tolist()
                for step, logits in enumerate(expected.logits):
                    check_close(together.logits[step][row : row + 1], logits, 1e-4)
