"""How a prompt becomes tokens, and where it is split: also with tokenizers and templates that tell little."""

import string

import pytest
from jinja2.exceptions import SecurityError, UndefinedError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError

REQUEST = Request("r", "A long text. ", "\n\nWhat <is> it? ", 4)
PLAIN = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
TRIMS = PLAIN.replace("m['content']", "m['content'] | trim")
ESCAPES = PLAIN.replace("m['content']", "m['content'] | escape")


def engine(tokenizer):
    found = object.__new__(TransformersEngine)  # without a model: `encode` asks the tokenizer alone
    found.tokenizer = tokenizer
    return found


def letters(template=None):
    """One token per character."""
    own = Tokenizer(models.WordLevel({letter: at for at, letter in enumerate(string.printable)}, unk_token="0"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=template)


@pytest.mark.parametrize("template", [None, PLAIN, TRIMS], ids=["none", "plain", "trims"])
def test_the_prompt_is_split_before_its_question(template):
    tokenizer = letters(template)
    whole, nothing = engine(tokenizer).encode(REQUEST, "prompt")
    context, suffix = engine(tokenizer).encode(REQUEST, "context")
    assert nothing == []
    assert context + suffix == whole
    text = "".join(string.printable[i] for i in suffix)
    assert text.lstrip("\n").startswith("What <is> it?")
    assert "A long text." in "".join(string.printable[i] for i in context)


def test_a_template_that_changes_the_question_is_told():
    whole, _ = engine(letters(ESCAPES)).encode(REQUEST, "prompt")
    assert "What &lt;is&gt; it?" in "".join(string.printable[i] for i in whole)
    with pytest.raises(UsageError, match="the chat template changes the question of sample r"):
        engine(letters(ESCAPES)).encode(REQUEST, "context")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.listdir('/') }}",
        "{{ messages.append('x') }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_nothing_but_the_messages(template):
    """transformers renders it in Jinja's sandbox, without a loader of files (docs/security.md)."""
    with pytest.raises((SecurityError, UndefinedError, TypeError), match=r"unsafe|undefined|no loader"):
        engine(letters(template)).encode(REQUEST, "prompt")


def test_a_tokenizer_without_offsets_serves_whole_prompts():
    tokenizer = ByT5Tokenizer()  # in Python: it knows no offsets
    ids, _ = engine(tokenizer).encode(REQUEST, "prompt")
    assert ids == tokenizer(REQUEST.context + REQUEST.question)["input_ids"]
    with pytest.raises(UsageError, match="ByT5Tokenizer does not tell where its tokens stand"):
        engine(tokenizer).encode(REQUEST, "context")


class MistralCommonBackend:
    """As transformers wraps mistral-common: a template of its own, no ``chat_template``, no offsets."""

    chat_template = None

    def apply_chat_template(self, conversation, tokenize=True, return_dict=False):
        assert tokenize, "control tokens would not be read back from text"
        return {"input_ids": [1, 3, *map(ord, conversation[0]["content"]), 4]}

    def __call__(self, text, add_special_tokens=True, **more):
        if more:
            raise ValueError(f"Kwargs {list(more)} are not supported")
        return {"input_ids": list(map(ord, text))}


def test_mistral_commons_own_template_is_used():
    ids, _ = engine(MistralCommonBackend()).encode(REQUEST, "prompt")
    assert (ids[:2], ids[-1]) == ([1, 3], 4)
    with pytest.raises(UsageError, match="MistralCommonBackend does not tell where its tokens stand"):
        engine(MistralCommonBackend()).encode(REQUEST, "context")


def test_an_empty_prompt_is_told():
    with pytest.raises(UsageError, match="sample r has an empty prompt"):
        engine(letters()).encode(Request("r", "", "", 4), "prompt")
