import json

import pytest
from pydantic import BaseModel

from bigbatch.cli import main
from bigbatch.config import RunConfig


def test_schema_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"duration", "batch", "optim", "task", "data"}
    assert schema["properties"]["duration"]["type"] == "string"
    assert set(schema["properties"]["optim"]["discriminator"]["mapping"]) >= {"sgd", "lars", "lamb", "adamw"}
    assert "global" in schema["$defs"]["Batch"]["properties"]


def test_every_section_is_closed_and_frozen() -> None:
    def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
        below = set(model.__subclasses__())
        return below.union(*(sections(child) for child in below)) if below else below

    from bigbatch.config.models import Section

    assert len(sections(Section)) > 30
    for section in sections(Section):
        assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"
