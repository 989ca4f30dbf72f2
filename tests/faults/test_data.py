"""Faults 13 to 20 and 24: broken, lossy, odd and hostile files of images and targets."""

import os
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data import audit
from pipeline.data.files import LARGEST, read_ids, read_image
from pipeline.data.formats import Record
from pipeline.data.store import Store
from pipeline.errors import InputError
from pipeline.prediction.batch import find_photographs
from stages import run_main
from tests.unit.pairs import MISSING_C, data_params, labels, photo, refusal, write


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack in threads: to start processes takes longer than all else here."""
    monkeypatch.setattr(audit, "ProcessPoolExecutor", lambda _, __: ThreadPoolExecutor(2))


def scene(seed: int = 0, size: tuple[int, int] = (240, 320)) -> np.ndarray:
    """A smooth picture, as photographs are, of blobs drawn by the seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, quality: int = 90, **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(header: tuple[int, int, int, int], packed: bytes) -> bytes:
    """A PNG of width, height, bits and kind of colour, and its compressed rows."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def pair(root: Path, name: str, image: bytes | None = None, target: bytes | None = None) -> None:
    """A good image and target of this name, but for the bytes that are given."""
    paths = write(root, name, photo(zlib.crc32(os.fsencode(name))), labels())
    for path, content in zip(paths, (image, target), strict=True):
        if content is not None:
            path.write_bytes(content)


# Row 13: files that are cut off or damaged.


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.97])
def test_a_truncated_image_is_refused_by_its_name(suffix: str, kept: float, tmp_path: Path):
    """Row 13."""
    image, target = write(tmp_path, "train/a", photo(0, (60, 80)), labels((60, 80)), suffix)
    image.write_bytes(image.read_bytes()[: int(image.stat().st_size * kept)])
    record = Record("train/a", str(image), str(target), "train")
    with pytest.raises(ValueError, match=f"train/a{suffix}: can't be read as an image"):
        data_params(tmp_path).reader().read(record)


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.9])
def test_a_truncated_target_is_refused_by_its_name(kept: float, tmp_path: Path):
    """Row 13."""
    ids = photo(1, (60, 80))[..., 0] % 3
    image, target = write(tmp_path, "train/a", photo(0, (60, 80)), ids)
    target.write_bytes(target.read_bytes()[: int(target.stat().st_size * kept)])
    record = Record("train/a", str(image), str(target), "train")
    with pytest.raises(ValueError, match=r"train/a\.png: can't be read as a target"):
        data_params(tmp_path).reader().read(record)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_garbage_inside_a_jpeg_is_refused(options: dict[str, object], tmp_path: Path):
    """Row 13: 300 bytes at random places. One in a hundred reads like data, and isn't found."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jpg"
    rough = np.clip(scene() + rng.normal(0, 8, scene().shape), 0, 255).astype(np.uint8)
    good = jpeg(rough, **options)
    first = good.find(b"\xff\xda") + 14
    refusals = []
    for number in range(60):
        place = int(rng.integers(first, len(good) - 400))
        garbage = rng.integers(0, 256, 300, dtype=np.uint8).tobytes()
        path.write_bytes(good[:place] + garbage + good[place + 300 * (number % 2) :])
        try:
            read_image(path)
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) >= 58
    assert all(one.startswith(f"{path}: can't be read as an image") for one in refusals)


@pytest.mark.parametrize("padding", [b"\0" * 8, b"\xff" * 8, b"\0"])
def test_bytes_that_cameras_put_behind_the_data_are_no_damage(padding: bytes, tmp_path: Path):
    """Row 13."""
    path = tmp_path / "a.jpg"
    good = jpeg(scene())
    path.write_bytes(good)
    expected, _ = read_image(path)
    path.write_bytes(good[:-2] + padding + good[-2:] + b"a thumbnail, perhaps")
    assert np.array_equal(read_image(path)[0], expected)


@pytest.mark.parametrize("kind", ["grey", "16 bits", "palette", "one bit"])
def test_no_flipped_bit_of_a_target_changes_its_ids(kind: str, tmp_path: Path):
    """Row 13: each bit of the file, one at a time; checksums of PNG tell."""
    ids = labels((5, 7))
    picture = Image.fromarray({"16 bits": ids.astype(np.uint16), "one bit": ids > 0}.get(kind, ids))
    if kind == "palette":
        picture.putpalette(list(range(256)) * 3)
    path = tmp_path / "a.png"
    picture.save(path)
    good, expected = path.read_bytes(), read_ids(path)
    refusals = []
    for place in range(8 * len(good)):
        content = bytearray(good)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert np.array_equal(read_ids(path), expected), place
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) == 8 * len(good)
    assert all(one.startswith(f"{path}: ") for one in refusals)


def test_a_target_whose_data_is_not_what_was_packed_is_refused(tmp_path: Path):
    """Row 13: its parts are whole, and the checksum of its pixels isn't right; or some lack."""
    path = tmp_path / "a.png"
    packed = zlib.compress(b"\0\1\2\0\0\2\1\0")
    path.write_bytes(png((3, 2, 8, 0), packed))
    assert read_ids(path).tolist() == [[1, 2, 0], [2, 1, 0]]
    for broken in (packed[:-4] + b"abcd", packed[:-4], packed[:-2]):
        path.write_bytes(png((3, 2, 8, 0), broken))
        with pytest.raises(InputError, match=re.escape(f"{path}: can't be read as a target")):
            read_ids(path)


def test_a_broken_file_is_told_with_all_the_others(tmp_path: Path):
    """Row 13, and `1 problem`, `2 problems`."""
    pair(tmp_path, "train/a", image=b"")
    pair(tmp_path, "val/b")
    (said,) = refusal(tmp_path)  # which reads `1 problem`
    assert said.startswith("images/train/a.png: can't be read as an image (none of JPEG, PNG,")
    pair(tmp_path, "val/c", target=b"\x89PNG")
    assert len(refusal(tmp_path)) == 2


# Row 14: the orientation of photographs.


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("policy", ["apply", "ignore"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_by_exif_as_viewers_do_unless_it_is_not_to(
    orientation: int, policy: str, suffix: str, tmp_path: Path
):
    """Row 14."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"images/train/a{suffix}"
    write(tmp_path, "train/a", photo(0), labels(), suffix)
    Image.fromarray(photo(0)).save(path, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image = shown if policy == "apply" else np.asarray(Image.open(path))
    Image.fromarray(labels(image.shape[:2])).save(tmp_path / "targets/train/a.png")
    reader = data_params(tmp_path, exif=policy).reader()
    read, ids = reader.read(reader.records()[0][0])
    assert np.array_equal(read, image)
    assert ids.shape == image.shape[:2]


@pytest.mark.parametrize(
    ("policy", "size", "drawn"),
    [("apply", (12, 16), "stored"), ("ignore", (16, 12), "shown")],
)
def test_a_target_of_the_other_orientation_is_refused_with_the_remedy(
    policy: str, size: tuple[int, int], drawn: str, tmp_path: Path
):
    """Row 14."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = write(tmp_path, "train/a", photo(0), labels(size))
    Image.fromarray(photo(0)).save(image, exif=exif)
    reader = data_params(tmp_path, exif=policy).reader()
    other = "ignore" if policy == "apply" else "apply"
    message = f"drawn for the photograph as it is {drawn}, .* set data.exif: {other}"
    with pytest.raises(ValueError, match=message):
        reader.read(reader.records()[0][0])


def test_a_target_that_viewers_turn_is_refused(tmp_path: Path):
    """Row 14."""
    exif = Image.Exif()
    exif[0x0112] = 3
    _, target = write(tmp_path, "train/a", photo(0), labels())
    Image.fromarray(labels()).save(target, exif=exif)
    reader = data_params(tmp_path).reader()
    with pytest.raises(ValueError, match=r"targets/train/a\.png: its orientation tag turns it"):
        reader.read(reader.records()[0][0])


# Rows 15 and 16: sizes and ids.


def test_an_image_and_a_target_of_different_sizes_are_both_named(tmp_path: Path):
    """Row 15."""
    pair(tmp_path, "val/b")
    write(tmp_path, "train/a", photo(0), labels((11, 16)))
    assert refusal(tmp_path) == [
        "images/train/a.png: 16x12 pixels, but its target targets/train/a.png has 16x11"
    ]


def test_an_id_out_of_range_is_named_with_its_file(tmp_path: Path):
    """Row 16."""
    pair(tmp_path, "val/b")
    strange = labels()
    strange[3, :2] = (3, 254)
    write(tmp_path, "train/a", photo(0), strange)
    assert refusal(tmp_path) == [
        "targets/train/a.png: class ids 3, 254 are neither below 3 (the number of data.classes) "
        "nor data.ignore_index 255"
    ]


# Row 17: what is in a file, whatever its name.


def read(folder: Path, target: Image.Image, suffix: str = ".png") -> np.ndarray:
    Image.fromarray(photo(0)).save(folder / "image.png")
    target.save(folder / f"target{suffix}")
    record = Record("x", str(folder / "image.png"), str(folder / f"target{suffix}"), "train")
    image, ids = data_params(folder).reader().read(record)
    assert np.array_equal(image, photo(0))
    return ids


def test_a_palette_target_keeps_its_indices(tmp_path: Path):
    """Row 17."""
    target = Image.fromarray(labels())
    target.putpalette([90, 90, 90, 0, 0, 0, *range(250, 256), *[7] * 756])
    assert target.mode == "P"
    assert np.array_equal(read(tmp_path, target), labels())


def test_a_palette_target_of_few_bits_keeps_its_indices(tmp_path: Path):
    """Row 17."""
    ids = labels() % 3
    target = Image.fromarray(ids)
    target.putpalette([90, 90, 90, 0, 0, 0, 255, 255, 255])
    assert np.array_equal(read(tmp_path, target), ids)
    assert (tmp_path / "target.png").read_bytes()[24] == 2  # bits a pixel


def test_a_16_bit_target_is_exact(tmp_path: Path):
    """Row 17."""
    ids = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)
    found = read(tmp_path, Image.fromarray(ids))
    assert found.dtype == np.uint16
    assert np.array_equal(found, ids)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_a_one_bit_target_has_ids_0_and_1(suffix: str, tmp_path: Path):
    """Row 17."""
    ids = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    assert np.array_equal(read(tmp_path, Image.fromarray(ids > 0), suffix), ids)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_an_8_bit_grey_target_is_taken_as_it_is(suffix: str, tmp_path: Path):
    """Row 17."""
    assert np.array_equal(read(tmp_path, Image.fromarray(labels()), suffix), labels())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_a_coloured_target_is_refused_by_its_name(mode: str, tmp_path: Path):
    """Row 17."""
    suffix = ".tif" if mode == "F" else ".png"
    with pytest.raises(ValueError, match=rf"target\{suffix}: a target holds one class id a pixel"):
        read(tmp_path, Image.fromarray(photo(0)).convert(mode), suffix)


def test_32_bit_ids_out_of_range_are_refused(tmp_path: Path):
    """Row 17."""
    ids = np.array([[0, 70000]], np.int32)
    with pytest.raises(ValueError, match=r"target\.tif: ids from 0 to 70000 are out of range"):
        read(tmp_path, Image.fromarray(ids), ".tif")


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grey_target_of_few_bits_keeps_its_ids(bits: int, tmp_path: Path):
    """Row 17."""
    ids = np.array([[0, 1, 2, 3]], np.uint8)
    packed = "".join(format(i, f"0{bits}b") for i in ids[0])
    row = b"\0" + bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    (tmp_path / "a.png").write_bytes(png((4, 1, bits, 0), zlib.compress(row)))
    assert read_ids(tmp_path / "a.png").tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 100}),
        ("WEBP", {"quality": 100}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "jpeg"}),
        ("GIF", {}),
    ],
)
@pytest.mark.parametrize("color_map", [None, [[0, 0, 0], [1, 1, 1], [2, 2, 2]]])
def test_a_lossy_target_is_refused_by_its_content(
    kind: str, options: dict[str, object], color_map: object, tmp_path: Path
):
    """Row 17: under the name of a PNG; the others of its kind keep every id."""
    pair(tmp_path, "val/b")
    _, target = write(tmp_path, "train/a", photo(0), labels() % 3)
    Image.fromarray(labels() % 3).save(target, kind, **options)
    found = refusal(tmp_path, color_map=color_map)
    said = "can't be read as a target" if kind == "GIF" else f"is a {kind} "
    assert sum(line.startswith(f"targets/train/a.png: {said}") for line in found) == 1
    assert kind == "GIF" or "save the target's source as PNG" in "".join(found)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_several_images_in_a_file_are_refused(kind: str, tmp_path: Path):
    """Row 17: an animation, or pages."""
    path = tmp_path / "a.png"
    frames = [Image.fromarray(photo(seed)) for seed in range(3)]
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"a\.png: holds several images, an animation or pages"):
        read_image(path)
    if kind != "WEBP":
        ids = [Image.fromarray(labels() + seed) for seed in range(3)]
        ids[0].save(path, kind, save_all=True, append_images=ids[1:])
        with pytest.raises(InputError, match=r"a\.png: holds several images"):
            read_ids(path)


def test_smaller_copies_beside_an_image_are_no_other_images(tmp_path: Path):
    """Row 17: what phones put behind a photograph, and overviews in maps."""
    picture, path = Image.fromarray(scene()), tmp_path / "a.jpg"
    picture.save(path)
    expected, _ = read_image(path)
    picture.save(path, "MPO", save_all=True, append_images=[picture.resize((32, 24))])
    assert Image.open(path).format == "MPO"
    assert np.array_equal(read_image(path)[0], expected)
    small = picture.resize((32, 24))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    picture.save(tmp_path / "a.tif", save_all=True, append_images=[small])
    assert Image.open(tmp_path / "a.tif").n_frames == 2
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], scene())


def test_values_of_12_bits_in_16_are_refused_and_true_16_bits_are_read(tmp_path: Path):
    """Row 17: they would become 0 to 15 of 255, nearly black."""
    grey = np.random.default_rng(0).integers(0, 65536, (12, 16), dtype=np.uint16)
    path = tmp_path / "a.png"
    Image.fromarray(grey >> 4).save(path)
    with pytest.raises(InputError, match=r"a\.png: its pixels have 16 bits and no value above 40"):
        read_image(path)
    Image.fromarray(grey).save(path)
    assert np.array_equal(read_image(path)[0][..., 0], grey >> 8)
    Image.fromarray(grey * 0).save(path)  # black it is
    assert read_image(path)[0].max() == 0


# Row 18: names.

NAMES = ["a b", "é ü", "same", "SAME", "new\nline", "red\x1b[31m", "tab\t", "'\"<b>&", "名前", "-x"]


def test_names_are_carried_through_unharmed(tmp_path: Path):
    """Row 18."""
    for seed, name in enumerate(NAMES):
        write(tmp_path, f"train/{name}", photo(seed), labels())
    pair(tmp_path, "val/x")
    audit.prepare(data_params(tmp_path), tmp_path / "prepared", lambda done, total: None)
    store = Store(tmp_path / "prepared")
    assert {entry.name for entry in store.split("train").entries} == {f"train/{n}" for n in NAMES}
    for seed, name in enumerate(NAMES):
        split, index = store.by_name()[f"train/{name}"]
        assert np.array_equal(split[index][0], photo(seed))


def test_a_terminal_obeys_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Row 18: newlines and escape codes are shown as such, by prepare and by every command."""
    name = "train/one\nline\x1b[31m\x07"
    pair(tmp_path, "val/x")
    pair(tmp_path, name, image=b"")
    found = "images/train/one\\nline\\x1b[31m\\x07.png: can't be read as an image"
    assert [line.startswith(found) for line in refusal(tmp_path)] == [True]

    def main() -> None:
        read_image(tmp_path / f"images/{name}.png")

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert "\x1b" not in str(ended.value)
    assert "\\x1b[31m\\x07.png" in str(ended.value)


@pytest.mark.parametrize("source", ["given", "drawn"])
def test_a_name_that_is_no_utf8_is_refused_and_nothing_is_written(source: str, tmp_path: Path):
    """Row 18."""
    pair(tmp_path, "train/a")
    pair(tmp_path, "val/b")
    odd = os.fsdecode(b"caf\xe9")
    paths = write(tmp_path, f"train/{odd}", photo(9), labels())
    found = refusal(tmp_path, **{"splits.source": source})  # which looks that nothing is left
    for folder in ("images", "targets"):
        said = f"{folder}/train/caf\\udce9.png: its name is no UTF-8"
        assert sum(line.startswith(said) for line in found) == 1
    for given in (paths[0], paths[0].parent):
        with pytest.raises(InputError, match="its name is no UTF-8"):
            find_photographs([str(given)])


# Row 19: splits with nothing in them.


def test_empty_splits_and_unlearnable_classes_are_found(tmp_path: Path):
    """Row 19."""
    without_c = np.minimum(labels(), 1)
    write(tmp_path, "train/1", photo(0), without_c)
    write(tmp_path, "val/1", photo(1), np.full((12, 16), 255, np.uint8))
    assert refusal(tmp_path) == [
        "neither val nor test has a labelled pixel; one of them must",
        MISSING_C,
    ]


def test_to_allow_missing_classes_is_not_to_allow_a_train_without_labels(tmp_path: Path):
    """Row 19."""
    write(tmp_path, "train/1", photo(0), np.full((12, 16), 255, np.uint8))
    write(tmp_path, "val/1", photo(1), labels())
    found = refusal(tmp_path, allow_missing_classes=True)
    assert found == ["split train has no labelled pixel"]


@pytest.mark.parametrize("changes", [{"val": 0.3, "test": 0.0}, {"folds": 3, "test": 0.1}])
def test_a_drawn_split_that_is_asked_for_must_have_an_image(changes: dict, tmp_path: Path):
    """Row 19."""
    write(tmp_path, "1", photo(1), labels())
    drawn = {"source": "drawn"} | changes
    named = {f"splits.{name}": value for name, value in drawn.items()}
    assert "split val has no labelled pixel" in refusal(tmp_path, **named)


def test_an_image_without_a_target_is_named(tmp_path: Path):
    """Row 19."""
    pair(tmp_path, "train/a")
    pair(tmp_path, "val/b")
    (tmp_path / "targets/val/b.png").unlink()
    pair(tmp_path, "val/c")
    assert refusal(tmp_path) == ["images/val/b.png: no target"]


# Row 20: one image in two splits.


def test_the_same_image_in_two_splits_is_refused_whatever_its_file(tmp_path: Path):
    """Row 20: the same bytes, and the same pixels in another format."""
    write(tmp_path, "train/a", photo(0), labels())
    write(tmp_path, "val/b", photo(0), labels())
    write(tmp_path, "test/c", photo(0), labels(), ".bmp")
    assert refusal(tmp_path) == [
        "the same image in train (train/a) and val (val/b) and test (test/c)"
    ]


def test_nearly_the_same_image_in_two_splits_is_a_warning_with_the_distance(tmp_path: Path):
    """Row 20: saved again as JPEG, made smaller, darker; other scenes aren't near."""
    whole = labels((240, 320))
    for seed in range(20):
        write(tmp_path, f"train/{seed}", scene(seed), whole)
    for seed in range(20, 30):
        write(tmp_path, f"val/{seed}", scene(seed), whole)
    write(tmp_path, "val/again", scene(3), whole)[0].write_bytes(jpeg(scene(3), 85))
    write(tmp_path, "val/small", scene(4)[::2, ::2], labels((120, 160)))
    write(tmp_path, "test/darker", (scene(5) * 0.8).astype(np.uint8), whole)
    params = data_params(tmp_path)
    found = audit.prepare(params, tmp_path / "prepared", lambda done, total: None)
    told = r"nearly the same image in (.*): (\d+) of the 256 bits of their perceptual hashes differ"
    matches = [re.fullmatch(told, line) for line in found]
    assert all(matches)
    assert {match[1] for match in matches if match} == {
        "train (train/3) and val (val/again)",
        "train (train/4) and val (val/small)",
        "train (train/5) and test (test/darker)",
    }
    assert all(int(match[2]) <= audit.ALIKE for match in matches if match)
    summary = (tmp_path / "prepared/summary.json").read_text(encoding="utf-8")
    assert all(line in summary for line in found)


# Row 24: bombs, and paths that lead out of the folder.


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_bomb_is_refused_by_its_header(kind: str, tmp_path: Path):
    """Row 24: it claims 1.6 billion pixels, and is refused before one is decoded."""
    image, target = write(tmp_path, "train/a", photo(0), labels(), f".{kind.lower()}")
    for path in (image, target) if kind == "PNG" else (image,):
        side = 40000
        header = {
            "PNG": png((side, side, 8, 0), zlib.compress(b"")),
            "BMP": b"BM"
            + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, side, side, 1, 24, *[0] * 6),
        }
        path.write_bytes(header[kind])
        said = f"40000x40000 pixels are more than the {LARGEST} OpenCV decodes"
        with pytest.raises(InputError, match=said):
            (read_image if path == image else read_ids)(path)


def test_the_limit_of_pixels_is_a_parameter(tmp_path: Path):
    """Row 24."""
    pair(tmp_path, "val/b")
    write(tmp_path, "train/a", photo(0, (20, 30)), labels((20, 30)))
    (said,) = refusal(tmp_path, max_pixels=599)
    assert said == "targets/train/a.png: 30x20 pixels are more than the 599 data.max_pixels allows"
    audit.prepare(data_params(tmp_path, max_pixels=600), tmp_path / "p", lambda done, total: None)
    with pytest.raises(
        InputError, match=r"images/train/a\.png: 30x20 pixels are more than the 599"
    ):
        read_image(tmp_path / "images/train/a.png", 599)
    assert data_params(tmp_path).max_pixels == 200_000_000


def test_data_that_would_be_more_than_the_pixels_is_not_unpacked(tmp_path: Path):
    """Row 24: 3x2 pixels, and a hundred million bytes behind them."""
    path = tmp_path / "a.png"
    path.write_bytes(png((3, 2, 8, 0), zlib.compress(bytes(10**8))))
    with pytest.raises(InputError, match="its data is more than its pixels"):
        read_ids(path)


def test_links_and_paths_out_of_the_folder_are_refused(tmp_path: Path):
    """Row 24."""
    root = tmp_path / "root"
    pair(root, "train/a")
    pair(root, "val/b")
    pair(tmp_path / "elsewhere", "train/c")
    (root / "images/linked").symlink_to(tmp_path / "elsewhere/images")
    (said,) = refusal(root)
    assert said.startswith("images/linked: a link to a folder, which DVC does not follow")
    for name in ("images", "targets"):
        for out in ("../elsewhere/images", str(tmp_path / "elsewhere")):
            with pytest.raises(ValueError, match=r"must be a folder below data\.root"):
                data_params(root, **{name: out})


BOMB = "<!DOCTYPE a [<!ENTITY a0 'aaaaaaaaaa'>" + "".join(
    f"<!ENTITY a{n} {quoteattr(f'&a{n - 1};' * 10).replace('&amp;', '&')}>" for n in range(1, 10)
)


COCO = (
    '{"images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 16}], "categories": '
    '[{"id": 3, "name": "b"}], "annotations": [{"image_id": 1, "category_id": 3, '
    '"segmentation": %s}]}'
)


@pytest.mark.parametrize(
    ("kind", "file", "content"),
    [
        ("cvat", "a.xml", BOMB + "]><annotations><image name='&a9;'/></annotations>"),
        ("coco", "a.json", "[" * 100_000),
        ("labelme", "a.json", '{"a":' * 100_000),
        (
            "labelme",
            "a.json",
            '{"shapes": [], "imageHeight": 1000000000, "imageWidth": 1000000000}',
        ),
        (
            "labelme",
            "a.json",
            '{"shapes": [{"label": "b", "points": [[0, 0], [3, 3], [3, "x"]]}], '
            '"imageHeight": 12, "imageWidth": 16}',
        ),
        ("yolo", "a.txt", "0 0.1 0.1 0.5 0.5 0.5 0.1 0.7"),
        ("yolo", "a.txt", "0 0.1 0.1 1e9 0.5 0.5 0.1"),
        ("yolo", "a.txt", "0 0.1 0.1 nan 0.5 0.5 0.1"),
        ("coco", "a.json", COCO % '{"size": [100000000, 100], "counts": [1, 9]}'),
        ("coco", "a.json", COCO % '{"size": [12, 16], "counts": "0Q1`0o4"}'),
    ],
)
def test_outlines_that_are_none_are_refused(kind: str, file: str, content: str, tmp_path: Path):
    """Row 24: entities and depths that explode, sizes of billions, points far out, no outlines."""
    pair(tmp_path, "a")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / file).write_text(content)
    params = data_params(tmp_path, **{"format": kind, "format.background": "a"})
    record = Record("a", str(tmp_path / "images/a.png"), f"{tmp_path}/annotations/{file}", "train")
    with pytest.raises(InputError, match=re.escape(file)):
        params.reader().read(record)
