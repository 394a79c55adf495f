import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from kd_demo import nets
from kd_demo.options import SensorNetOptions, SensorsOptions
from kd_demo.sensors import AXES, CLASSES, KEYS, sensor_net, sensors
from kdcore.data import Task
from kdcore.errors import ModelError

FEW = {"train": 40, "val": 10, "test": 10}
TASK = Task("classification", CLASSES)


def test_a_recording_depends_on_seed_split_and_index_alone():
    first, again, more, other = (
        sensors(SensorsOptions(**{**FEW, **change})) for change in ({}, {}, {"train": 80}, {"seed": 1})
    )
    for key in (*KEYS, "label"):
        assert torch.equal(first["train"].columns[key], again["train"].columns[key])
        assert torch.equal(first["train"].columns[key], more["train"].columns[key][:40])
        assert not torch.equal(first["train"].columns[key], other["train"].columns[key])
        assert not torch.equal(first["val"].columns[key], first["test"].columns[key])
    assert first.sample("train", 3)["imu"].shape == (3, 32, AXES)


def test_both_sensors_record_the_same_movement():
    """Without noise, both recordings of a movement are as strong as it is."""
    quiet = {"imu_noise": 0, "series_noise": 0, "train": 200, "val": 1, "test": 1}
    columns = sensors(SensorsOptions(**quiet))["train"].columns
    strength = torch.stack([columns[key].square().mean((1, 2)).sqrt() for key in KEYS])
    for label in range(len(CLASSES)):
        mine = columns["label"] == label
        assert torch.corrcoef(strength[:, mine])[0, 1] > 0.9
    other = columns["label"] != columns["label"].roll(1)
    assert not torch.allclose(columns["imu"][other], columns["imu"].roll(1, 0)[other], atol=1e-2)


def test_the_noise_of_each_sensor_is_its_own():
    quiet = sensors(SensorsOptions(**FEW, imu_noise=0, series_noise=0))["train"].columns
    noisy = sensors(SensorsOptions(**FEW, imu_noise=0.3, series_noise=2.0))["train"].columns
    for key, level in (("imu", 0.3), ("series", 2.0)):
        assert (noisy[key] - quiet[key]).std() == pytest.approx(level, rel=0.1)


def test_only_training_labels_are_corrupted():
    clean, wrong = (sensors(SensorsOptions(train=500, val=20, test=20, label_noise=n)) for n in (0, 0.4))
    changed = (clean["train"].columns["label"] != wrong["train"].columns["label"]).float().mean()
    assert changed == pytest.approx(0.4, abs=0.05)
    assert torch.equal(clean["val"].columns["label"], wrong["val"].columns["label"])


@pytest.mark.parametrize("inputs", [["imu"], ["series"], ["imu", "series"]])
def test_a_network_reads_its_sensors_learns_and_loads_without_kdcore(tmp_path, inputs):
    torch.manual_seed(0)
    batch = sensors(SensorsOptions(**FEW)).sample("train", 40)
    model = sensor_net(SensorNetOptions(inputs=inputs, width=8), TASK)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        outputs = model(batch)
        losses.append(F.cross_entropy(outputs.logits, batch["label"]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert outputs.logits.shape == (40, len(CLASSES))
    assert outputs.embedding.shape == (40, 16)
    assert losses[-1] < 0.8 * losses[0]
    assert model.tap("@all") == ["concat", "fc1", "fc2"]
    model.save(tmp_path)
    alone = nets.load(tmp_path)
    with torch.no_grad():
        logits = alone(**{key: batch[key] for key in inputs})["logits"]
        torch.testing.assert_close(logits, model(batch).logits)
    again = sensor_net(SensorNetOptions(inputs=inputs, checkpoint=str(tmp_path)), TASK)
    assert torch.equal(again.module.fc1.weight, model.module.fc1.weight)


def test_what_does_not_fit_gets_a_clear_sentence(tmp_path):
    batch = sensors(SensorsOptions(**FEW)).sample("train", 4)
    with pytest.raises(ValueError, match=r"the sensor 'imu' must give \[B, T, 6\], but has shape \[4, 32, 3\]"):
        sensor_net(SensorNetOptions(inputs=["imu"], channels=6), TASK)(batch)
    with pytest.raises(ModelError, match="demo-sensors is made for tasks of kind classification"):
        sensor_net(SensorNetOptions(), Task("segmentation", CLASSES))
    with pytest.raises(ValidationError, match="names a sensor twice: imu, imu"):
        SensorNetOptions(inputs=["imu", "imu"])
    sensor_net(SensorNetOptions(inputs=["imu"]), TASK).save(tmp_path)
    with pytest.raises(ModelError, match=r"was made for inputs=.'imu'., the data asks for .'series'."):
        sensor_net(SensorNetOptions(inputs=["series"], checkpoint=str(tmp_path)), TASK)
