"""A user's script, checked by mypy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
from modeling_rice import RiceClips, RiceGallery, RiceModel
from processing_rice import RiceProcessor

model = RiceModel.from_pretrained("runs/demo/model").eval()
processor = RiceProcessor.from_pretrained("runs/demo/model")
gallery: RiceGallery = model.encode_gallery(**processor(images=["red.jpg", "blue.jpg"]))
clips: RiceClips = model.encode_clips(**processor(videos=[["frame_0.jpg", "frame_1.jpg"]]))
few: RiceGallery = RiceGallery.cat([gallery[:1], gallery[1:].to("cpu")])
scores = model.match(clips, few) + model.similarity(clips, few)
best: list[dict] = model.rank("clip.mp4", few, top_k=1, processor=processor)
print(float(scores.max()), best[0]["corpus_id"], few.embeds.shape, clips.mask is None, len(clips[0]))
"""


@pytest.mark.slow
def test_a_script_that_loads_encodes_slices_matches_and_ranks_has_no_type_error(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "script.py")]
    environment = {**os.environ, "MYPYPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert "checked 1 source file" in done.stdout, done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("script.py")], done.stdout
