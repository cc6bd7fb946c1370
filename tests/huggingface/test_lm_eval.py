import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from transformers import PreTrainedTokenizerFast

from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.huggingface.attaching.attachment import add_memory
from memorizing.huggingface.learning.adapter import save_adapter
from memorizing.huggingface.lm_eval import MemorizingLM, parse_layers
from tests.training.finetuning.tools import (
    MEMORY,
    START,
    WINDOW,
    make_base,
    make_model,
    make_texts,
    make_tokenizer,
)

TEXT = make_texts(3, 97)[1].text
SETTINGS = {name: value for name, value in MEMORY.items() if name != "dtype"}


def make_lm(**changes: Any) -> MemorizingLM:
    arguments = {**SETTINGS, "tokenizer": make_tokenizer(), **changes}
    return MemorizingLM(make_base(), **arguments)


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="task")


def test_without_memory_it_is_plain_within_the_window():
    plain = HFLM(make_base(), tokenizer=make_tokenizer())
    lm = make_lm(memory=False)
    pairs = [ask("a mem", "ory"), ask("a mem", "o"), ask("", "read"), ask("b", " c d e f")]
    expected = plain.loglikelihood(pairs, disable_tqdm=True)
    for mine, theirs in zip(lm.loglikelihood(pairs, disable_tqdm=True), expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert mine[1] == theirs[1]
    texts = [ask(TEXT[: WINDOW - 1]), ask("a")]
    expected = plain.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, abs=1e-4)
    wish = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}
    requests = [ask("a mem", wish), ask("re", wish)]
    assert lm.generate_until(requests, disable_tqdm=True) == plain.generate_until(
        requests, disable_tqdm=True
    )


def test_rolling_reads_whole_documents_in_order():
    documents = make_texts(61, 83, 7)
    requests = [ask(document.text) for document in documents]
    found = make_lm().loglikelihood_rolling(requests, disable_tqdm=True)
    result = evaluate_model(make_model(dtype="bfloat16"), documents, make_tokenizer())
    expected = [-float(one.token_nats.sum(dtype=np.float64)) for one in result.documents]
    assert found == pytest.approx(expected)
    assert make_lm(memory=False).loglikelihood_rolling(requests, disable_tqdm=True) != found


def test_contexts_are_read_into_memory_and_their_order_does_not_matter():
    lm = make_lm()
    long = [ask(TEXT, end) for end in (" no", " memory", " yes, of course")]
    pairs = [long[0], ask(TEXT[:40], "abc"), long[1], ask("a", "b"), long[2]]
    found = lm.loglikelihood(pairs, disable_tqdm=True)
    assert lm.loglikelihood(pairs[::-1], disable_tqdm=True)[::-1] == found
    alone = [make_lm().loglikelihood([pair], disable_tqdm=True)[0] for pair in pairs]
    assert alone == found
    # A continuation costs what the end of the whole text costs.
    whole = lm.loglikelihood_rolling([ask(TEXT), ask(TEXT + " no")], disable_tqdm=True)
    context, continuation = [START, *lm.tok_encode(TEXT)], lm.tok_encode(" no")
    ((nats, _),) = lm._loglikelihood_tokens([(None, context, continuation)])
    assert nats == pytest.approx(whole[1] - whole[0], abs=1e-3)
    off = make_lm(memory=False).loglikelihood(pairs, disable_tqdm=True)
    assert off[3] == pytest.approx(found[3])
    assert off[0][0] != pytest.approx(found[0][0], abs=1e-6)


def test_a_document_is_read_whole_whatever_max_length_says():
    requests = [ask(TEXT), ask("a mem")]
    whole = make_lm().loglikelihood_rolling(requests, disable_tqdm=True)
    for most in (1, 13, len(TEXT)):
        cut = make_lm(max_length=most).loglikelihood_rolling(requests, disable_tqdm=True)
        assert cut == whole


def test_a_question_is_cut_to_max_length_and_an_answer_is_not():
    pairs = [ask(TEXT[:40], "memory"), ask("re", "ad")]
    plain = HFLM(make_base(), tokenizer=make_tokenizer(), max_length=11)
    lm = make_lm(memory=False, max_length=11)
    expected = plain.loglikelihood(pairs, disable_tqdm=True)
    for mine, theirs in zip(lm.loglikelihood(pairs, disable_tqdm=True), expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4)
    longer = lm.tok_encode(TEXT[:12], add_special_tokens=False)
    for answer, words in (([], "0 tokens"), (longer, f"{len(longer)} tokens.*max_length = 11")):
        with pytest.raises(ConfigError, match=words):
            lm._loglikelihood_tokens([(None, [START], answer)])


def test_an_answer_that_merges_with_its_question_is_scored():
    tokens = ["h", "e", "l", "o", " ", "w", "r", "d", "hello", " wor", " world"]
    merges = [tuple(pair.split("|")) for pair in _MERGES.split()]
    words = {token: number for number, token in enumerate(["<s>", *tokens, *_PARTS])}
    backend = Backend(BPE({k.replace(" ", "_"): v for k, v in words.items()}, merges))
    backend.normalizer = Replace(" ", "_")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    lm = MemorizingLM(make_base(), tokenizer=tokenizer, **SETTINGS)
    assert lm._encode_pair("hello wor", "ld")[1] == lm.tok_encode("ld")
    for question, answer in (("hello wor", "ld"), ("hell", "o")):
        ((nats, _),) = lm.loglikelihood([ask(question, answer)], disable_tqdm=True)
        assert nats < 0.0


_MERGES = "h|e he|l hel|l hell|o _|w _w|o _wo|r _wor|l _worl|d"
_PARTS = ["he", "hel", "hell", " w", " wo", " worl"]


def test_a_special_token_that_stands_in_a_text_is_text():
    tokenizer = make_tokenizer()
    lm = make_lm()
    special = tokenizer.all_special_tokens[0]
    expected = tokenizer.encode(special, split_special_tokens=True, add_special_tokens=False)
    assert lm.tok_encode(special, add_special_tokens=False) == expected
    assert lm.tok_batch_encode([special])[0][0].tolist()[-len(expected) :] == expected
    assert len(expected) > 1
    assert lm.tokenizer.split_special_tokens is False


def test_code_of_a_model_is_never_run():
    with pytest.raises(ConfigError, match="never run"):
        make_lm(trust_remote_code=True)


def test_generating_in_batches_changes_nothing():
    wish = {"until": ["\n\n"], "max_gen_toks": 19, "do_sample": False}
    requests = [ask(TEXT[:n], wish) for n in (53, 13, 3, 41)]
    # Of entries in bf16 that are equally near, any may be found: here all are.
    settings = {"num_neighbors": 73, "capacity": 73}
    alone = make_lm(**settings).generate_until(requests, disable_tqdm=True)
    together = make_lm(batch_size=3, **settings).generate_until(requests, disable_tqdm=True)
    assert together == alone
    assert make_lm(memory=False).generate_until(requests, disable_tqdm=True) != alone


def test_an_adapter_brings_its_own_memory(tmp_path):
    model = add_memory(make_base(), **{**MEMORY, "dtype": "bfloat16"}, bias=0.7)
    save_adapter(model, tmp_path)
    lm = MemorizingLM(make_base(), tokenizer=make_tokenizer(), adapter=str(tmp_path))
    found = lm.loglikelihood_rolling([ask(TEXT)], disable_tqdm=True)
    expected = evaluate_model(model, make_texts(3, 97)[1:], make_tokenizer()).nats
    assert found[0] == pytest.approx(-expected)
    with pytest.raises(ConfigError, match="has its own layers"):
        make_lm(adapter=str(tmp_path))


def test_a_task_of_lm_eval_runs():
    from datasets import Dataset, DatasetDict
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"text": document.text} for document in make_texts(61, 83)]
    task = {
        "task": "tiny",
        "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows)}),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    results = simple_evaluate(
        make_lm(),
        tasks=[task],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    expected = evaluate_model(make_model(dtype="bfloat16"), make_texts(61, 83), make_tokenizer())
    found = results["results"]["tiny"]["bits_per_byte,none"]
    assert found == pytest.approx(expected.bits_per_byte)


def test_it_is_registered_and_understands_its_arguments():
    from lm_eval.api.registry import get_model

    assert get_model("memorizing") is MemorizingLM
    assert parse_layers(20) == [20]
    assert parse_layers("18:20") == [18, 20]
    assert parse_layers([1]) == [1]
    assert parse_layers(None) is None
    with pytest.raises(ConfigError, match="18:20 for two"):
        parse_layers("a")
    with pytest.raises(ConfigError, match="give a number"):
        make_lm(batch_size="auto")


def test_without_lm_eval_the_command_is_named(monkeypatch: pytest.MonkeyPatch):
    import importlib

    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "memorizing.huggingface.lm_eval")
    with pytest.raises(IndexUnavailableError, match=r"pip install \"memorizing\[eval\]\""):
        importlib.import_module("memorizing.huggingface.lm_eval")
