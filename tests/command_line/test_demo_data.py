"""What the demo reads: files and texts of its own, and the batches made of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from demo_tiny_model import tiny_folder, tokenizer

from eaft_ext.cli import batches
from eaft_ext.cli.demo import corpus
from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.records import Record, read_records

__all__ = ["tiny_folder", "tokenizer"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TestReadingData:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"text": "t"}, Record("t")),
            ({"prompt": "p", "completion": "c"}, ("c", ["p"])),
            ({"question": "q", "answer": "a", "id": 7}, ("a", ["q"])),
            ({"instruction": "i", "output": "o"}, ("o", ["i"])),
            ({"instruction": "i", "input": "more", "output": "o"}, ("o", ["i\n\nmore"])),
            (
                {
                    "messages": [
                        {"role": "user", "content": "u"},
                        {"role": "assistant", "content": "a"},
                    ]
                },
                ("a", ["u"]),
            ),
        ],
    )
    def test_known_fields(self, tmp_path: Path, fields: dict[str, Any], expected: Any) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(fields) + "\n\n")
        if isinstance(expected, tuple):
            text, prompts = expected
            conversation = tuple({"role": "user", "content": prompt} for prompt in prompts)
            expected = Record(text, conversation)
        assert list(read_records(path)) == [expected]

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{oops", "line 2: not JSON (Expecting property name"),
            ("[1, 2]", "line 2: expected a JSON object, got [1, 2]"),
            (
                '{"body": "x"}',
                "line 2: expected the fields text, messages, conversations, prompt/completion",
            ),
            ('{"body": "x"}', "got ['body']"),
            ('{"text": 3}', "line 2: 'text' must be text that is not empty, got 3"),
            ('{"question": "q", "answer": " "}', "line 2: 'answer' must be text that is not empty"),
            ('{"messages": "hi"}', "line 2: messages must be a list of 2 or more, got 'hi'"),
            ('{"messages": [1, 2]}', "line 2: a message must be an object, got 1"),
            (
                json.dumps({"messages": [{"role": "user", "content": "u"}] * 2}),
                "line 2: the last message must be the assistant's, got role 'user'",
            ),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path: Path, line: str, complaint: str) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(CommandError) as error:
            read_records(path)
        assert complaint in str(error.value)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("name", "content", "complaint"),
        [
            ("empty.txt", b" \n", "is empty"),
            ("latin.txt", b"caf\xe9", "byte 3 is 0xe9, which is not UTF-8"),
            ("line.txt", b"only this", "too little text to divide"),
            ("one.jsonl", b'{"text": "a"}\n{"text": "a"}', "1 different record is too few"),
        ],
    )
    def test_unusable_files_are_named(
        self, tmp_path: Path, name: str, content: bytes, complaint: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CommandError, match=complaint):
            corpus.read_corpus(path)

    def test_jsonl_is_divided_without_overlap_whatever_the_order(self, tmp_path: Path) -> None:
        lines = [json.dumps({"text": f"record {i % 40}"}) for i in range(60)]
        divided = []
        for name, order in (("a.jsonl", lines), ("b.jsonl", lines[::-1])):
            path = tmp_path / name
            path.write_text("\n".join(order))
            divided.append(corpus.read_corpus(path))
        held_out = [{record.text for record in part.held_out} for part in divided]
        assert held_out[0] == held_out[1]
        assert len(held_out[0]) == 8
        assert held_out[0].isdisjoint(record.text for record in divided[0].train)
        assert len(divided[0].train) + len(divided[0].held_out) == 60

    def test_text_is_held_out_at_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "own.txt"
        path.write_text("\n\n".join("abcdefghij"))
        divided = corpus.read_corpus(path)
        assert divided.train[0].text.split() == list("abcdefgh")
        assert divided.held_out[0].text.split() == ["i", "j"]

    def test_language_reference_shares_no_paragraph(self) -> None:
        reference = corpus.language_reference()

        def paragraphs(records: list[Record]) -> set[str]:
            return {
                " ".join(part.split()) for record in records for part in record.text.split("\n\n")
            }

        train, held_out = paragraphs(reference.train), paragraphs(reference.held_out)
        assert len(train) > 1000 and len(held_out) > 100
        assert train.isdisjoint(held_out)

    def test_prose_is_text_without_its_sources(self) -> None:
        passages = corpus.prose()
        assert len(passages) == 4
        assert all(len(passage.text) > 1000 and "#" not in passage.text for passage in passages)


class TestBatches:
    def test_labels_are_shifted_and_padded(self) -> None:
        batch = batches.collate(
            [batches.Example([5, 6, 7, 8]), batches.Example([5, 6, 7], prompt_length=2)]
        )
        assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
        assert batch.labels.tolist() == [[6, 7, 8, -100], [-100, 7, -100, -100]]

    def test_text_is_packed_end_to_end(self, tokenizer: Any) -> None:
        records = [Record("the class"), Record("in order")]
        rows = list(batches.examples(records, tokenizer, 4))
        tokens = [token for row in rows for token in row.tokens]
        assert tokenizer.decode(tokens) == "the class<eos>in order<eos>"
        assert all(len(row.tokens) == 4 for row in rows[:-1])

    @pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
    def test_prompts_are_not_learned(
        self, tokenizer: Any, template: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        record = Record("the answer", ({"role": "user", "content": "What is it?"},))
        (row,) = batches.examples([record], tokenizer, 100)
        batch = batches.collate([row])
        learned = batch.labels[batch.labels != -100]
        assert tokenizer.decode(learned) == "the answer<eos>"
        prompt = "<|user|>What is it?\n<|assistant|>" if template else "What is it?\n"
        assert tokenizer.decode(row.tokens) == prompt + "the answer<eos>"

    @pytest.mark.parametrize(("question", "answer"), [("q" * 50, "a"), ("q", "a" * 50)])
    def test_long_conversations_are_cut_but_keep_a_label(
        self, tokenizer: Any, question: str, answer: str
    ) -> None:
        record = Record(answer, ({"role": "user", "content": question},))
        (row,) = batches.examples([record], tokenizer, 16)
        assert len(row.tokens) == 16
        assert 1 <= row.prompt_length < 16

    def test_training_text_is_repeated_when_it_runs_out(self, tokenizer: Any) -> None:
        made = batches.training_batches(
            [Record("the class")], tokenizer, steps=5, batch_size=2, length=8, seed=0
        )
        assert len(made) == 5
        assert all(len(batch.input_ids) == 2 for batch in made)

    def test_training_reads_all_text_before_any_again(self, tokenizer: Any) -> None:
        records = [Record(letter * 7) for letter in "abcdefgh"]
        made = batches.training_batches(records, tokenizer, steps=8, batch_size=1, length=8, seed=0)
        assert len({batch.input_ids[0, 0].item() for batch in made}) == 8

    def test_text_of_one_token_is_refused(self, tiny_folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
        tokenizer.eos_token = None
        with pytest.raises(CommandError, match="fewer than 2 tokens"):
            batches.training_batches(
                [Record("x")], tokenizer, steps=1, batch_size=1, length=8, seed=0
            )

    @pytest.mark.parametrize("max_tokens", [2, 250, 320, 10**6])
    def test_evaluation_reads_as_much_as_asked(self, tokenizer: Any, max_tokens: int) -> None:
        records = [Record(f"record {i} of the order") for i in range(200)]
        rows = batches.evaluation_rows(records, tokenizer, length=16, max_tokens=max_tokens)
        whole = sum(len(row.tokens) for row in batches.examples(records, tokenizer, 16))
        assert batches.count_tokens(rows) == min(max_tokens, whole)
        if max_tokens == 320:
            assert "19" in tokenizer.decode(rows[-1].tokens)  # not only the beginning

    def test_evaluation_cuts_the_last_conversation_at_its_end(self, tokenizer: Any) -> None:
        """A token that is predicted has all of its prompt before it."""
        question = {"role": "user", "content": "which is the order ?"}
        records = [Record("the order of the class", (question,)) for _ in range(9)]
        (whole, *_) = batches.examples(records, tokenizer, 64)
        num_tokens = len(whole.tokens)
        for rest in range(1, num_tokens + 1):
            *rows, last = batches.evaluation_rows(
                records, tokenizer, length=64, max_tokens=2 * num_tokens + rest
            )
            assert rows == [whole, whole]
            assert last.tokens == whole.tokens[:rest]
            assert last.prompt_length == min(rest, whole.prompt_length)
            learned = (batches.collate([last]).labels >= 0).sum()
            assert learned == max(0, rest - whole.prompt_length)
