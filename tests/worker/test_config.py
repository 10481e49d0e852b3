"""Settings: which layer wins, what is refused, and whether the refusal helps."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from worker.config import Config, resolve
from worker.errors import Fatal


def refusal(flags: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    with pytest.raises(Fatal) as caught:
        resolve(flags, environment)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file that sets three settings."""
    path = tmp_path / "earshot.toml"
    path.write_text('group = "file"\ninstance = "file"\nbroker = "file"\n')
    return path


class TestPrecedence:
    def test_defaults(self) -> None:
        """With nothing given, every setting has its default."""
        config = resolve({}, {})

        assert Config() == config
        assert socket.gethostname() == config.instance

    def test_layers(self, file: Path) -> None:
        """The command line wins over the environment, that over the file, and that over the default."""
        flags = {"config": str(file), "group": "flag"}
        environment = {"EARSHOT_GROUP": "environment", "EARSHOT_INSTANCE": "environment"}

        config = resolve(flags, environment)

        assert Config(group="flag", instance="environment", broker="file") == config

    @pytest.mark.parametrize("name", Config.__struct_fields__)
    def test_every_setting_in_every_layer(self, name: str, tmp_path: Path) -> None:
        """Each setting is a flag, a variable and a line of the file under the one name that it has."""
        default = getattr(Config(), name)
        choices: dict[str, Any] = {
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_mechanism": "PLAIN",
            "on_lost_offset": "earliest",
            "log_format": "json",
            "log_level": "debug",
            "health_port": 8080,
            "min_record_seconds": 0.25,
        }
        others: dict[type, Any] = {bool: True, int: 7, float: 0.5}
        value = choices.get(name) or others.get(type(default), "other")
        path = tmp_path / "earshot.toml"
        path.write_text(f"{name} = {msgspec.json.encode(value).decode()}\n")

        expected = msgspec.structs.replace(Config(), **{name: value})

        assert default != value
        assert expected == resolve({name: str(value)}, {})
        assert expected == resolve({}, {f"EARSHOT_{name.upper()}": str(value)})
        assert expected == resolve({"config": str(path)}, {})

    def test_a_given_default_still_wins(self, file: Path) -> None:
        """A flag that repeats the default is a choice, and beats the file."""
        config = resolve({"config": str(file), "group": "earshot"}, {})

        assert config.group == "earshot"


class TestFile:
    def test_named_by_the_environment(self, file: Path) -> None:
        """EARSHOT_CONFIG names the file, and is no setting itself."""
        assert resolve({}, {"EARSHOT_CONFIG": str(file)}).group == "file"

    def test_the_flag_wins(self, file: Path) -> None:
        """A file named on the command line replaces the one that the environment names, which is not even read."""
        assert resolve({"config": str(file)}, {"EARSHOT_CONFIG": "/nowhere.toml"}).group == "file"

    def test_empty_name(self) -> None:
        """An EARSHOT_CONFIG without a value, as Compose passes an unset one, names no file."""
        assert Config() == resolve({}, {"EARSHOT_CONFIG": ""})

    def test_missing(self, tmp_path: Path) -> None:
        """A file that is not there is named."""
        path = tmp_path / "nowhere.toml"

        assert str(path) in refusal({"config": str(path)}, {})

    @pytest.mark.parametrize("content", [b"group = ", b"group = '\xff'"])
    def test_unreadable(self, file: Path, content: bytes) -> None:
        """A file that is no TOML, or not UTF-8, is named."""
        file.write_bytes(content)

        assert str(file) in refusal({"config": str(file)}, {})

    def test_no_file_in_a_file(self, file: Path) -> None:
        """A file cannot name another one."""
        file.write_text("config = 'other.toml'")

        assert "`config`" in refusal({"config": str(file)}, {})


class TestRefusals:
    def test_unknown_flag(self) -> None:
        """An unknown setting is named, with the layer it came from and the settings there are."""
        text = refusal({"pol_seconds": "2"}, {})

        assert "`pol_seconds`" in text
        assert "the command line" in text
        assert "poll_seconds" in text

    def test_a_value_out_of_range(self) -> None:
        """The setting is named with its value, where it is from and what was expected, and nothing else."""
        refused = refusal({"max_batch_records": "0"}, {})

        assert "max_batch_records from the command line is '0': Expected int >= 1" == refused

    def test_a_secret_that_does_not_fit(self, file: Path) -> None:
        """It is named, and not shown."""
        file.write_text("kafka_sasl_password = [40961]")

        refused = refusal({"config": str(file)}, {})

        assert "kafka_sasl_password" in refused
        assert "40961" not in refused

    @pytest.mark.parametrize("name", ["EARSHOT_POL_SECONDS", "EARSHOT_POLLSECONDS", "EARSHOT_POLL_SECOND"])
    def test_misspelt_variable(self, name: str) -> None:
        """It is not ignored, and the text says which setting may be meant."""
        assert f"{name} is no setting; is EARSHOT_POLL_SECONDS meant?" == refusal({}, {name: "2"})

    @pytest.mark.parametrize("name", ["PORT", "SERVICE_HOST", "SERVICE_PORT", "PORT_9092_TCP", "PORT_9092_TCP_ADDR"])
    def test_what_kubernetes_sets_for_a_service_of_that_name(self, name: str) -> None:
        """It is nobody's setting, and does not stop a worker."""
        assert Config() == resolve({}, {f"EARSHOT_{name}": "tcp://10.0.0.1:9092"})

    def test_unknown_in_the_file(self, file: Path) -> None:
        """A misspelt line is not ignored, and the file is named."""
        file.write_text("pol_seconds = 2")

        text = refusal({"config": str(file)}, {})

        assert "`pol_seconds`" in text
        assert str(file) in text

    def test_a_hidden_layer_is_checked(self, file: Path) -> None:
        """A wrong value is refused even where a better layer hides it: it would strike later."""
        file.write_text("poll_seconds = -1")

        text = refusal({"config": str(file), "poll_seconds": "1"}, {})

        assert "poll_seconds" in text
        assert str(file) in text

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *((name, value) for name in ("max_batch_records", "max_record_bytes") for value in ("0", "-1", "1.5", "")),
            *((name, value) for name in ("poll_seconds", "give_up_seconds") for value in ("0", "-1", "nan", "soon")),
            *((name, value) for name in ("max_record_seconds", "drift_block_seconds") for value in ("0", "nan", "")),
            *(("drift_delta", value) for value in ("0", "1", "nan", "2e-3 ")),
            *(("drift_quorum", value) for value in ("0", "two")),
            *(("health_port", value) for value in ("-1", "65536", "http", "")),
            *(("log_format", value) for value in ("", "xml")),
            *(("log_level", value) for value in ("", "INFO", "trace")),
        ],
    )
    def test_ranges(self, name: str, value: str) -> None:
        """A value out of its range is refused, naming the setting and where it was set."""
        text = refusal({}, {f"EARSHOT_{name.upper()}": value})

        assert text.startswith(f"{name} from the environment is {value!r}: ")


class TestEnvironment:
    def test_foreign_variables(self) -> None:
        """Variables of others, and those of the tests, are nobody's setting."""
        environment = {"HOME": "/", "EARSHOTS": "1", "EARSHOT_TEST_KAFKA": "localhost:9092", "GROUP": "other"}

        assert Config() == resolve({}, environment)

    def test_inputs_stay_as_they_are(self) -> None:
        """Neither mapping is changed."""
        flags, environment = {"config": ""}, {"EARSHOT_CONFIG": ""}

        resolve(flags, environment)

        assert {"config": ""} == flags
        assert {"EARSHOT_CONFIG": ""} == environment
