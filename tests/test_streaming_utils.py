"""Data sets that are read as they are needed; runs are the SD1.5 script's unless a test says otherwise."""

import io
import json
import logging
import tarfile
import types
from itertools import islice
from pathlib import Path

import datasets
import pytest
from accelerate import Accelerator
from conftest import FAMILIES, reset_accelerate
from helpers import checkpoint_state, equal, read_network, read_scalars

import train_adt_sdxl
from data_utils import check_used_images, load_image_caption_dataset, load_micro_batches
from streaming_utils import Stream
from train_adt_sd15 import parse_args
from training_utils import ADTError


NUM_SHARDS, ROWS_A_SHARD = 5, 7


@pytest.fixture
def family():
    return FAMILIES["sd15"]


def number_rows(shards):
    for shard in shards:
        for row in range(ROWS_A_SHARD):
            yield {"n": ROWS_A_SHARD * shard + row}


def make_stream(num_shards=NUM_SHARDS, buffer_size=6, num_workers=0, process=(1, 0), seed=3):
    features = datasets.Features({"n": datasets.Value("int64")})
    shards = {"shards": list(range(num_shards))}
    rows = datasets.IterableDataset.from_generator(number_rows, features=features, gen_kwargs=shards)
    args = types.SimpleNamespace(seed=seed, dataloader_num_workers=num_workers, shuffle_buffer_size=buffer_size)
    return Stream(rows, args, *process)


def numbers(stream, count):
    return [row["n"] for row, _ in islice(stream.read(0), count)]


# The order, and going on in it


def test_each_epoch_has_every_row_once_in_another_order():
    total = NUM_SHARDS * ROWS_A_SHARD
    order = numbers(make_stream(), 2 * total)
    assert sorted(order[:total]) == sorted(order[total:]) == list(range(total))
    assert order[:total] != order[total:] and order[:total] != sorted(order[:total])
    assert order != numbers(make_stream(seed=4), 2 * total)
    alone = numbers(make_stream(buffer_size=1), total)  # the shards are shuffled all the same
    assert alone != sorted(alone) and alone[:ROWS_A_SHARD] == sorted(alone[:ROWS_A_SHARD])


@pytest.mark.parametrize("at", [1, 5, 6, 7, 11, 34, 35, 36, 69, 70, 75])
def test_reading_goes_on_at_the_exact_row(tmp_path, at):
    """Within a block of 6 rows, between two, at an epoch's end of 35, and in the epochs after it."""
    stream, rest = make_stream(), 100
    whole = list(islice(stream.read(0), at + rest))
    stream.positions = {0: whole[at - 1][1]}
    stream.save(tmp_path)
    resumed = make_stream()
    resumed.load(tmp_path)
    assert numbers(resumed, rest) == [row["n"] for row, _ in whole[at:]]


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_two_processes_have_other_rows(num_shards):
    """By shards, or one of two rows each where there are fewer."""
    seen = []
    for process in range(2):
        stream = make_stream(num_shards, process=(2, process))
        own = len(range(process, num_shards, 2)) * ROWS_A_SHARD if num_shards > 1 else (4, 3)[process]
        seen.append(numbers(stream, own))
    assert sorted(seen[0] + seen[1]) == list(range(num_shards * ROWS_A_SHARD))


def test_a_reader_holds_the_buffer_and_no_more(monkeypatch):
    """However long the stream is: what it has read is at most the buffer ahead of what it has given out."""
    read, original = [0], number_rows

    def counting(shards):
        for row in original(shards):
            read[0] += 1
            yield row

    monkeypatch.setitem(globals(), "number_rows", counting)
    for given, _ in enumerate(islice(make_stream(num_shards=100).read(0), 690)):
        assert read[0] - given <= 6 + 1 + 1


def test_empty_shards_are_refused():
    stream = make_stream()
    stream.rows = stream.rows.filter(lambda row: False)
    with pytest.raises(ADTError, match="Some shards of the stream are empty, and a worker has no others"):
        next(stream.read(0))


# Images and captions


@pytest.fixture(scope="module")
def shards_path(tmp_path_factory, dataset_path):
    """The images as three parquet files, and two of them as another split."""
    path = tmp_path_factory.mktemp("shards")
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    for n in range(3):
        rows.shard(3, n).to_parquet(path / f"train-{n:05d}-of-00003.parquet")
    rows.select([0, 1]).to_parquet(path / "test-00000-of-00001.parquet")
    return path


@pytest.fixture
def streamed(options, shards_path):
    """Options of a run that streams the parquet files, or what else they name."""

    def make(*more, output_dir="out"):
        arguments = options(
            "--dataset_name", shards_path, "--streaming", "--shuffle_buffer_size", 3, *more, output_dir=output_dir
        )
        at = arguments.index("--train_data_dir")
        return arguments[:at] + arguments[at + 2 :]

    return make


@pytest.fixture
def stream_run(streamed, family, tmp_path):
    def run(*more, output_dir="out"):
        reset_accelerate()
        family.train.main(parse_args(streamed(*more, output_dir=output_dir)))
        return tmp_path / output_dir

    return run


@pytest.fixture
def loading(streamed):
    """What `load_micro_batches` takes of a run, and the options."""

    def make(*more, first_iteration=0):
        args = parse_args(streamed(*more))
        accelerator, dataset = Accelerator(cpu=True), load_image_caption_dataset(args)
        return types.SimpleNamespace(
            args=args, accelerator=accelerator, dataset=dataset, first_iteration=first_iteration
        )

    return make


def load(run, num_iterations):
    """The items of so many iterations, each by its place in the global batch."""
    loader, items = load_micro_batches(run, save_checkpoint=None), []
    for iteration in range(num_iterations):
        for _ in range(run.args.gradient_accumulation_steps):
            examples = next(loader)
            rows = zip(examples["positions"], examples["captions"], examples["pixel_values"], strict=True)
            items += [(iteration, *row) for row in rows]
    return items


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_follow_from_the_rows_before_them(loading, tmp_path, num_workers):
    """However they are put into micro-batches, and from any iteration on; an epoch of 8 has each image once."""
    workers = ("--dataloader_num_workers", num_workers, "--random_flip", "--max_train_steps", 8)
    whole = load(loading(*workers, "--train_batch_size", 3), 8)
    assert [(iteration, position) for iteration, position, *_ in whole] == [(k, j) for k in range(8) for j in range(3)]
    if num_workers == 0:
        assert len({caption for *_, caption, _ in whole[:8]}) == len({caption for *_, caption, _ in whole[8:16]}) == 8
    run = loading(*workers, "--train_batch_size", 1, "--gradient_accumulation_steps", 3)
    assert equal(load(run, 3), whole[:9])
    run.dataset.save(tmp_path)
    run = loading(*workers, "--train_batch_size", 3, first_iteration=3)
    run.dataset.load(tmp_path)
    assert run.dataset.num_workers == num_workers
    assert equal([item[1:] for item in load(run, 5)], [item[1:] for item in whole[9:]])


def test_each_row_can_be_read_by_a_resume_of_its_own(loading, tmp_path):
    """Of parquet files, whose library position is one within a table, in blocks of three."""
    run = loading()
    whole = [row["text"] for row, _ in islice(run.dataset.read(0), 20)]
    rows = []
    for _ in whole:
        stream = loading().dataset
        if rows:
            stream.load(tmp_path)
        row, stream.positions[0] = next(stream.read(0))
        stream.save(tmp_path)
        rows.append(row["text"])
    assert rows == whole


def make_tars(path, dataset_path, damaged=()):
    """The images as two WebDataset shards."""
    path.mkdir()
    lines = Path(dataset_path, "metadata.jsonl").read_text().splitlines()
    for shard in range(2):
        with tarfile.open(path / f"{shard:05d}.tar", "w") as tar:
            for n in range(4 * shard, 4 * shard + 4):
                content = {"txt": json.loads(lines[n])["text"].encode()}
                content["png"] = Path(dataset_path, f"{n:03d}.png").read_bytes()[: -200 if n in damaged else None]
                for kind, data in content.items():
                    info = tarfile.TarInfo(f"{n:03d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return ("--dataset_name", path, "--image_column", "png", "--caption_column", "txt")


def test_web_dataset_and_its_bad_images(loading, dataset_path, tmp_path):
    shards = make_tars(tmp_path / "whole", dataset_path)
    whole = load(loading(*shards), 4)
    assert len({caption for *_, caption, _ in whole}) == 8
    bad = int(whole[5][2][-1])  # in the third iteration
    damaged = make_tars(tmp_path / "damaged", dataset_path, [bad])

    def save(iteration, run):
        run.dataset.save(tmp_path)
        raise ADTError(f"Saved at {iteration}.")

    loader = load_micro_batches(loading(*damaged), save)
    message = rf"The image with the caption 'a .* {bad}' of the dataset \(.*00{bad}.png\) does not decode.*Saved at 2"
    with pytest.raises(ADTError, match=message):
        for _ in range(4):
            next(loader)
    run = loading(*damaged, "--skip_bad_images", first_iteration=2)
    run.dataset.load(tmp_path)
    rest = load(run, 1)
    assert [caption for *_, caption, _ in rest] == [whole[4][2], whole[6][2]]
    assert equal(load(loading(*damaged, "--skip_bad_images"), 3)[4:], [(2, *item[1:]) for item in rest])


def test_stream_without_an_image_that_decodes_ends(loading, dataset_path, tmp_path):
    damaged = make_tars(tmp_path / "damaged", dataset_path, range(8))
    with pytest.raises(ADTError, match="The image with the caption .* does not decode"):
        load(loading(*damaged, "--skip_bad_images"), 1)


def test_first_rows_are_checked(loading, shards_path, dataset_path, tmp_path, caplog, monkeypatch):
    def check(*more):
        run = loading(*more)
        check_used_images(run.dataset, 0, run.args, run.accelerator)

    check()
    captions = make_captions(tmp_path / "captions", shards_path)
    with caplog.at_level(logging.WARNING):
        check("--dataset_name", captions)
    assert any("Of the first 8 rows 3 captions are empty" in message for message in caplog.messages)
    drawn = load(loading("--dataset_name", captions, "--max_train_steps", 20), 20)
    assert {caption for *_, caption, _ in drawn} == {"", " ", "one", "two"}
    damaged = make_tars(tmp_path / "damaged", dataset_path, [0])
    with pytest.raises(ADTError, match="The image with the caption 'a red square 0' .* does not decode"):
        check(*damaged)
    check(*damaged, "--check_images", "none")
    with caplog.at_level(logging.WARNING):
        check(*damaged, "--skip_bad_images")
    assert any("1 of 8 images are bad, and each time the next one stands in" in message for message in caplog.messages)
    monkeypatch.setattr(Stream, "head", lambda stream, count: [])
    with pytest.raises(ADTError, match="The dataset is empty"):
        check()


def make_captions(path, shards_path):
    """Rows with lists of captions."""
    rows = datasets.load_dataset(str(shards_path), split="train").remove_columns("text")
    path.mkdir()
    rows.add_column("text", [["one", "two"], [""], []] + [["one"]] * 4 + [[" "]]).to_parquet(path / "rows.parquet")
    return path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--use_aspect_ratio_buckets",),
            "--use_aspect_ratio_buckets needs the size of each image at the start, which",
        ),
        (("--max_train_samples", 3), "--max_train_samples draws from the whole dataset, which --streaming does not"),
        (("--check_images", "all"), "--check_images all would read the whole dataset, which is what --streaming avoi"),
    ],
)
def test_what_needs_the_whole_dataset_is_refused(streamed, capsys, more, message):
    with pytest.raises(SystemExit):
        parse_args(streamed(*more))
    assert message in " ".join(capsys.readouterr().err.split())


def test_epochs_and_caches_of_captions_are_refused(streamed, tmp_path, capsys):
    arguments = streamed("--num_train_epochs", 2)
    at = arguments.index("--max_train_steps")
    with pytest.raises(SystemExit):
        parse_args(arguments[:at] + arguments[at + 2 :])
    assert "--num_train_epochs needs the number of images" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_adt_sdxl.parse_args(streamed("--cache_text_embeddings", tmp_path / "cache"))
    assert "--cache_text_embeddings needs all captions at the start" in capsys.readouterr().err


def test_columns_and_splits_are_checked(loading):
    assert len({caption for *_, caption, _ in load(loading("--dataset_split", "test"), 4)}) == 2
    with pytest.raises(ADTError, match="The dataset has no valid split, only test, train|only train, test"):
        loading("--dataset_split", "valid")
    with pytest.raises(ADTError, match="--caption_column words is not a column of the dataset, which has image, text"):
        loading("--caption_column", "words")
    with pytest.raises(ADTError, match="--image_column text does not hold images"):
        loading("--image_column", "text")


def test_an_old_library_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "4.0.0")
    with pytest.raises(ADTError, match="--streaming needs datasets 4.8; this is 4.0.0"):
        make_stream()


# Runs


def test_resumed_run_equals_uninterrupted_run(stream_run, tmp_path):
    """Two readers of three rows an iteration; checkpoints are within a block, and one where reader 1 is next."""
    more = ("--dataloader_num_workers", 2, "--train_batch_size", 3, "--max_train_steps", 3, "--checkpointing_steps", 1)
    full = stream_run(*more, output_dir="full")
    for first in (1, 2):
        resumed = stream_run(
            *more, "--resume_from_checkpoint", full / f"checkpoint-{first}", output_dir=f"from-{first}"
        )
        state, expected = (checkpoint_state(path / "checkpoint-3") for path in (resumed, full))
        assert equal(state, expected) and equal(read_network(resumed), read_network(full))
        scalars = [read_scalars(path) for path in (resumed, full)]
        for name, values in scalars[0].items():
            assert values == {step: value for step, value in scalars[1][name].items() if step > first}, name
    with pytest.raises(ADTError, match="was made with the stream .*'workers': 2.*now .*'workers': 1"):
        stream_run(*more, "--dataloader_num_workers", 1, "--resume_from_checkpoint", full / "checkpoint-2")
    with pytest.raises(ADTError, match="another configuration: shuffle_buffer_size 3 .now 4"):
        stream_run(*more, "--shuffle_buffer_size", 4, "--resume_from_checkpoint", full / "checkpoint-2")


def test_plain_fine_tuning_streams_a_folder(options, family, tmp_path):
    family.train.main(parse_args(options("--streaming", "--adversarial_loss_weight", 0, "--max_train_steps", 2)))
    assert read_scalars(tmp_path / "out")["diffusion_loss"].keys() == {1, 2}
