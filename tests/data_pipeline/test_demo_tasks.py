"""All finetuning tasks' demo data from one demo directory."""
import shutil

from unimo2_paddle.data.demo_tasks import TASKS, write_demo_tasks


def test_every_task_gets_its_folder_once_and_a_second_call_keeps_it(demo_data, tmp_path):
    out = tmp_path / "demo"
    shutil.copytree(demo_data, out)
    first = write_demo_tasks(out)
    assert [name for name in TASKS if not (out / name).is_dir()] == []
    assert not list(out.glob("*.tmp")) and ".tmp" not in first
    marker = out / "vqa" / "kept"
    marker.write_text("mine")
    (out / "glue").rename(tmp_path / "gone")
    second = write_demo_tasks(out)
    assert marker.is_file() and (out / "glue").is_dir()
    assert second.count("there already") == len(TASKS) - 1
