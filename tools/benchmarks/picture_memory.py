"""Memory of a machine whose ranks read Flickr30k's 29,000 training pictures at 384 pixels, decoded once."""
import multiprocessing
import tempfile

from bench import Line, alternate, compare
from pictures import write_photographs

from unimo2_paddle.data.images import decode_image, resize_image
from unimo2_paddle.data.picture_cache import PictureFile

PICTURES, SIZE, RANKS = 29000, 384, 8
SAMPLE = {"tiny": 24, "base": 160}


def private_bytes():
    """Memory of this process that no other shares and that the system cannot take back (Linux)."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith(("Private_Dirty", "Private_Hugetlb")))


def _read_all(directory, paths, answers):
    """What one rank's reader holds more after it has read everything from the shared file."""
    before = private_bytes()
    cache = PictureFile(directory, paths, SIZE, True)
    total = sum(int(cache.get(number)[0, 0, 0]) for number in range(len(paths)))
    answers.put((private_bytes() - before, total))


def measure(options):
    count = SAMPLE[options.size]
    with tempfile.TemporaryDirectory() as directory:
        paths = write_photographs(directory, count)
        cache = PictureFile(directory, paths, SIZE, True)
        for number, path in enumerate(paths):
            cache.put(number, resize_image(decode_image(path), SIZE))
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        readers = [context.Process(target=_read_all, args=(directory, paths, answers)) for _ in range(2)]
        for reader in readers:
            reader.start()
        held = max(answers.get()[0] for _ in readers)
        for reader in readers:
            reader.join()
        times = alternate({"file": lambda: [cache.get(number) for number in range(count)],
                           "decode": lambda: [resize_image(decode_image(path), SIZE) for path in paths[:8]]}, options.repeats)
    ours, other = held * RANKS / 1e9, RANKS * PICTURES * SIZE * SIZE * 3 * 4 / 1e9
    disk = PICTURES * SIZE * SIZE * 3 / 1e9
    return [
        Line(f"memory of {RANKS} ranks for {PICTURES:,} pictures at {SIZE} px", ours, "GB", other, bar="<= 2 GB", reached=ours <= 2.0,
             note=f"Measured: what a process holds more after reading {count} pictures of Flickr30k's size ({SIZE * SIZE * 3 * count / 1e6:.0f} MB) "
                  f"from `data.picture_cache`, {held / 1e6:.1f} MB, which does not grow with their number; times {RANKS}. The file is {disk:.1f} GB of "
                  "disk, which the system keeps in memory while there is room and takes back when there is none. The other side, reckoned: every rank's "
                  "own float32 copy, as the authors' reader has it."),
        compare("a picture from the shared file, against decoding it again", [seconds / count for seconds in times["file"]],
                [seconds / 8 for seconds in times["decode"]], "ms", scale=1e3, note="In the page cache; from a disk, its speed decides."),
    ]
