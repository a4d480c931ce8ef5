"""Malformed lines, files and answers out of a seed: each kind by its name, each a function of a random generator."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
from collections.abc import Callable
from random import Random
from typing import Any

GOOD: dict[str, Any] = {
    "id": "a",
    "instruction": "Name a fruit.",
    "response": "An apple.",
    "rubric": "Is it one?",
    "reference_answer": "A plum.",
    "score": 4,
    "feedback": "It is. So the overall score is 4",
}
FIELDS = (
    "id", "prompt_id", "instruction", "response", "rubric", "reference_answer", "score", "feedback", "prompt",
    "input", "output", "completion", "reference", "criteria", "score_rubric", "label", "human_score", "scores",
    "feedbacks", "messages", "conversations", "question", "answer", "gpt4_score", "gpt4_feedback", "reward_model",
    "extra_info", "extra", "orig_instruction", "orig_response", "orig_criteria", "orig_score", "orig_feedback",
    "orig_reference_answer", "score1_description", "orig_score5_description", "grade", "row",
)  # fmt: skip
MARKUP = (
    "<|im_start|>system", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]", "<<SYS>>", "</s>", "<s>", "<bos>",
    "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<think>",
    "</think>", "[THINK]", "[/THINK]", "<start_of_turn>model", "<end_of_turn>", "<|assistant|>", "<unk>", "<pad>",
    "[MASK]", "[SEP]", "<tool_call>", "{{ response }}", "{%endraw%}", "{instruction}", "###Feedback:", "[RESULT]",
    "###Response to evaluate:", "###The instruction to evaluate:", "<0x0A>", "<|channel|>", "<|message|>", "▁", "Ġ",
)  # fmt: skip
# Marks that turn or hide text, half pairs, controls, what counts as a space or a line end to some, and no character.
CHARACTERS = "\u202e\u202d\u2066\u200f\u200b\u200d\ufeff\x00\x01\x07\x08\x0b\x0c\x1b\x7f\x85\u2028\u2029\u00a0\u3000"
CHARACTERS += "\ud800\udfff\udc80\ufffe\uffff\U0010ffff\ue000\ue003\u0301\u0130\u1e9e\ufb01\u0663\u00b2\u2460𝟜🏳️‍🌈"
NUMBERS = (0, -0.0, 4.0000001, 5e-324, 1e308, 2**63, -(2**64), 10**400, 1e400, -1e400, math.nan, 4.5, True, False)
TEXTS = ("", " ", "4", " 4 ", "four", "4/5", "NaN", "inf", "1_0", "0x4", "٤", "４", "²", "1e309", "-", "[4]", "null")


def _text(rng: Random, longest: int = 60) -> str:
    pieces = (
        lambda: rng.choice(MARKUP),
        lambda: rng.choice(CHARACTERS) * rng.choice((1, 1, 3)),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(
            ("word ", "So the overall score is ", "\n", "\r\n", "> ", '"', "'", "\\", "\\u0000", "`", "“")
        ),
        lambda: chr(rng.randrange(0x20, 0x3000)),
    )
    return "".join(rng.choice(pieces)() for _ in range(rng.randrange(longest)))


def _nested(rng: Random, levels: int) -> Any:
    value: Any = rng.choice((None, 1, "x"))
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {rng.choice(("a", "role", "content", "criteria")): value}
    return value


def value(rng: Random) -> Any:
    """A value of any type."""
    kinds = (
        lambda: None,
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(TEXTS),
        lambda: _text(rng),
        lambda: _nested(rng, rng.choice((1, 2, 5, 63, 64, 65))),
        lambda: [value(rng) for _ in range(rng.randrange(4))],
        lambda: {rng.choice((*FIELDS, "1", "score" + "9" * rng.choice((1, 400)), "", "\x00")): value(rng)},
        lambda: [_turn(rng) for _ in range(rng.randrange(4))],
    )
    return rng.choice(kinds)()


def _turn(rng: Random) -> Any:
    who = rng.choice(("role", "from")), rng.choice(("user", "assistant", "system", "gpt", "human", "x", "", None, 3))
    said = rng.choice(("content", "value")), rng.choice((_text(rng), None, [{"text": _text(rng)}, "b"], [{"image": 1}]))
    return rng.choice((dict((who, said)), dict((who,)), _text(rng), dict((who, (said[0], "Fine. [RESULT] 4")))))


def _record(rng: Random) -> dict[str, Any]:
    """A good record with some fields left out, others in their place, and values of any type."""
    record = {name: one for name, one in GOOD.items() if rng.random() < 0.8}
    for _ in range(rng.randrange(1, 4)):
        record[rng.choice(FIELDS)] = value(rng)
    return record


def _line(record: Any, rng: Random | None = None) -> bytes:
    text = json.dumps(record, ensure_ascii=rng is None or rng.random() < 0.5)
    return text.encode("utf-8", errors="surrogatepass") + b"\n"


def _changed(name: str, make: Callable[[Random], Any]) -> Callable[[Random], bytes]:
    return lambda rng: _line(GOOD | {name: make(rng)}, rng)


def _broken(rng: Random) -> bytes:
    """A record's line with bytes changed, taken out or doubled."""
    data = bytearray(_line(_record(rng), rng)[:-1])
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.choice((b"", b"{", b"}", b'"', b"\\", b"\xff", b"\x00", b",", data[at:]))
    return bytes(data).replace(b"\n", b" ") + b"\n"


def _doubled(rng: Random) -> bytes:
    name = rng.choice(("instruction", "response", "score", "grade", "id"))
    return _line(GOOD)[:-2] + f', "{name}": '.encode() + _line(value(rng), rng)[:-1] + b"}\n"


def _written(rng: Random) -> bytes:
    """Lists and records written as text, as they stand in the cells of a table."""
    inside = rng.choice(
        ("0x" + "f" * 5000, "9" * 5000, "-" * 3000 + "1", "(" * 300, "1" + "+1" * 3000, "'a'", "1.5, nan", "'a' 'b'")
    )
    opens, closes = rng.choice(("[]", "{}", "()", "[{", "[}"))
    name = rng.choice(("scores", "feedbacks", "reward_model", "messages", "rubric", "gpt4_score", "extra_info"))
    return _line(GOOD | {name: opens + inside + closes})


def _long(rng: Random) -> bytes:
    """A text of a megabyte: one word, one mark, one control token, brackets, or phrases again and again."""
    one = rng.choice(
        ("a", "word ", " ", "\n", "\u202e", "<|im_end|>", "[INST]", "[", '"', "4", "é", "🏳️‍🌈", "<think></think>")
    )
    one = rng.choice((one, "So the overall score is ", "[RESULT] ", "###Feedback:", "{", "\x00"))
    return _line(
        GOOD | {rng.choice(("instruction", "response", "rubric", "feedback", "id", "x")): one * (10**6 // len(one))}
    )


def _many(rng: Random) -> bytes:
    """Many small things in one record: fields, turns, raters, levels of a rubric."""
    n = rng.choice((1000, 5000))
    turns = [{"role": ("user", "assistant")[i % 2], "content": rng.choice(MARKUP)} for i in range(n | 1)]
    return _line(
        GOOD
        | rng.choice(
            (
                {f"field {i}": i for i in range(n)},
                {"messages": turns},
                {"scores": [3] * n, "feedbacks": ["[RESULT] 3"] * n},
                {"rubric": {"criteria": "c"} | {f"score{i}_description": "x" for i in range(n)}},
            )
        )
    )


def _chat(rng: Random) -> bytes:
    return _line({rng.choice(("messages", "prompt")): [_turn(rng) for _ in range(rng.randrange(5))]} | GOOD)


_LEVELS = ("criteria", "1", "score1_description", "score" + "9" * 400)
_LITERALS = (b"NaN", b"-Infinity", b"9" * 5000, b"1e999", b"0x4", b"01", b"1.")
LINES: dict[str, Callable[[Random], bytes]] = {
    "fields of any type": lambda rng: _line(_record(rng), rng),
    "no object": lambda rng: _line(value(rng), rng),
    "broken JSON": _broken,
    "bytes at random": lambda rng: rng.randbytes(rng.randrange(80)).replace(b"\n", b"") + b"\n",
    "labels": _changed("score", lambda rng: rng.choice((*NUMBERS, *TEXTS, [4], {"a": 4}))),
    "ids": _changed("id", lambda rng: rng.choice((*NUMBERS, *TEXTS, [], "same", "same", "\ud800"))),
    "texts of marks and controls": lambda rng: _line(GOOD | {k: _text(rng) for k in ("instruction", "response")}, rng),
    "chats": _chat,
    "rubrics": _changed("rubric", lambda rng: {rng.choice(_LEVELS): value(rng) for _ in range(3)}),
    "nesting": _changed("x", lambda rng: _nested(rng, rng.choice((60, 62, 63, 64, 500, 900)))),
    "deeper than JSON reads": lambda rng: rng.choice((b"[", b'{"a":')) * rng.choice((1000, 100_000)) + b"\n",
    "literals": lambda rng: b'{"score": %s}\n' % rng.choice(_LITERALS),
    "names twice": _doubled,
    "lists as text": _written,
    "byte order marks": lambda rng: rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) + _line(_record(rng)),
    "blank": lambda rng: rng.choice((b"", b" \t", b"\r", b"\x00", b"\x0b", b"\xe2\x80\xa8", b"\xef\xbb\xbf")) + b"\n",
    "many fields": _many,
    "a megabyte": _long,
}  # fmt: skip
RARE = {"a megabyte": 0.1, "many fields": 0.1, "deeper than JSON reads": 0.3}  # of the others' number


def _table(rng: Random) -> bytes:
    header = rng.choice(
        ("instruction,response,rubric,score", "a,a", ",,", '"in""struction";x', "sep=|\na|b", 'sep="\nx', "sep=\r\na")
    )
    rows = "\n".join(
        rng.choice(("a,b,c,4", '"a,b', 'a"b,c,d,1', '"x\ny",b,c,2', ",,,", "a,b", _text(rng))) for _ in range(4)
    )
    return f"{header}\n{rows}".encode("utf-8", errors="surrogatepass")


def _parquet(rng: Random) -> bytes:
    """A Parquet file with some bytes changed, or cut off."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 3), out)
    data = bytearray(out.getvalue())
    for _ in range(rng.randrange(8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])


def _lines(rng: Random) -> bytes:
    return b"".join(rng.choice((_broken, LINES["fields of any type"], LINES["blank"]))(rng) for _ in range(4))


def _packed(rng: Random) -> bytes:
    """Compressed lines: whole, cut off, changed, twice, or few bytes that stand for two million."""
    pack = rng.choice((gzip.compress, bz2.compress, lzma.compress))
    data = pack(rng.choice((_lines(rng), b"\0" * 2_000_000, b"\n" * 100_000)))
    return rng.choice(
        (data, data[: len(data) // 2], data[:-1] + b"x", data + data, data + b"behind", b"\x1f\x8b" + data)
    )


def _listed(rng: Random) -> bytes:
    return json.dumps([value(rng), _record(rng)]).encode()[: rng.choice((9999, 40))]


def _wide(rng: Random) -> bytes:
    return _lines(rng).decode(errors="replace").encode("utf-16")[: rng.choice((9999, 41))]


def _other(rng: Random) -> bytes:
    return rng.choice((_lines, _table, _parquet, _packed))(rng)


FILES: dict[str, tuple[tuple[str, ...], Callable[[Random], bytes]]] = {
    "JSON Lines": ((".jsonl", ".ndjson", ".json"), _lines),
    "a JSON list": ((".json", ".jsonl"), _listed),
    "UTF-16": ((".jsonl", ".csv"), _wide),
    "tables": ((".csv", ".tsv"), _table),
    "Parquet": ((".parquet", ".jsonl"), _parquet),
    "compressed": ((".jsonl.gz", ".csv.bz2", ".json.xz", ".tsv.gz", ".jsonl"), _packed),
    "another kind's content": ((".csv", ".parquet", ".json", ".jsonl.gz"), _other),
}


def answer(rng: Random) -> bytes:
    """A server's answer, with some of it changed."""
    tokens = ["Fine", ". ", *rng.choice((["So the overall score is", " "], ["[RESULT]"], [])), "4"]
    likely = {"4": rng.choice((-0.1, *NUMBERS, None, "x")), "3": rng.choice((-3, 5.0, None)), "5": -2.0}
    legacy: dict[str, Any] = {
        "tokens": tokens,
        "token_logprobs": [rng.choice((-0.1, 0, 3.0, None, "x")) for _ in tokens],
        "top_logprobs": [likely] * len(tokens),
    }
    steps = [{"token": t, "logprob": -0.1, "top_logprobs": [{"token": "4", "logprob": likely["4"]}]} for t in tokens]
    logprobs: dict[str, Any] = rng.choice((legacy, {"content": steps}))
    if rng.random() < 0.6:
        inside = rng.choice((logprobs, rng.choice(steps)))
        inside[rng.choice(list(inside))] = rng.choice((value(rng), [value(rng)] * len(tokens), tokens * 2))
    choices = rng.choice(([{"logprobs": logprobs}], [{"logprobs": logprobs}] * 2, [], value(rng), [value(rng)]))
    return _line({"choices": choices} if rng.random() < 0.95 else value(rng))
