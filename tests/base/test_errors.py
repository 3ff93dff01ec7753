"""What a user must not find in any output: credentials."""

from __future__ import annotations

import json

import pytest
import yaml

from raystar.base.console import run_cli
from raystar.base.errors import RaystarError
from raystar.base.secrets import redact, redact_value
from raystar.config.load import to_yaml
from raystar.config.schema import Config

HIDDEN = {
    "http://user:hunter2@host:5000/path": "http://***@host:5000/path",
    "https://hunter2@host": "https://***@host",
    "http://user:hun@ter2@host/": "http://***@host/",
    "postgresql+psycopg://me:hun/ter2@db/mlflow?sslmode=require": "postgresql+psycopg://***@db/mlflow?sslmode=require",
    "at 's3://key:hunter2@bucket' and ftp://a:hunter2@b": "at 's3://***@bucket' and ftp://***@b",
    "https://b.s3.aws.com/x.png?X-Amz-Signature=hunter2&a=1": "https://b.s3.aws.com/x.png?X-Amz-Signature=***&a=1",
    "https://a/b?sv=1&sig=hunter2%3D": "https://a/b?sv=1&sig=***",
    "?token=hunter2&user=me;api_key=hunter2": "?token=***&user=me;api_key=***",
    "AWS_SECRET_ACCESS_KEY=hunter2 AWS_REGION=x": "AWS_SECRET_ACCESS_KEY=*** AWS_REGION=x",
    "hf-token: hunter2\nname: x": 'hf-token: "***"\nname: x',
    "--set data.password='hunter2 and more' --name a": "--set data.password='***' --name a",
    '{"apiKey": "hunter2\\" more", "n": 1}': '{"apiKey": "***", "n": 1}',
    "Authorization: Bearer hunter2": "Authorization: Bearer ***",
    "/x/api_token: api_key=hunter2 password: hunter2": '/x/api_token: api_key=*** password: "***"',
    "secret: expected token: hunter2 x": 'secret: expected token: "***" x',
    "--set api_token: hunter2: expected key=value": '--set api_token: "***" expected key=value',
    "token: not": 'token: "***"',
    "http://h/a/token=hunter2": "http://h/a/token=***",
}
SHOWN = [
    "http://127.0.0.1:5000/#/experiments/1", "http://host:80/a@b", "sqlite:////home/me@work/mlflow.db",
    "mail me@example.com", "hf://org/model@main", "max_tokens=5 tokenizer: word", "raystar.signature: abc",
    "data.data_root: /x/api_token: expected a folder with one folder per domain", "/x/token: [Errno 2] No such file",
    "--images secret: expected a folder, found nothing", "--checkpoint ./account_key: No such file or directory",
    "api_key: Permission denied", "at '/x/password': it", "/x/authorization: Is a directory",
    "password:\nname: x", "a secret", "design=3", '"http://a/b","me@c"', "",
]  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN)
def test_credentials_are_hidden_and_the_rest_is_kept(text: str) -> None:
    assert redact(text) == HIDDEN[text]
    assert redact(redact(text)) == HIDDEN[text]


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redact(text) == text


def test_files_stay_what_they_are() -> None:
    plain = to_yaml(Config())
    assert redact(plain) == plain
    secret = {"command": "tune --uri http://a:hunter2@b --set x.token=hunter2", "signature": "0123", "token": "hunter2"}
    for read, text in ((json.loads, json.dumps(secret, indent=1)), (yaml.safe_load, yaml.safe_dump(secret, width=200))):
        left = read(redact(text))
        assert "hunter2" not in str(left)
        assert left["signature"] == "0123"


def test_values_are_hidden_by_their_names() -> None:
    assert redact_value("data.hf_token", "two words") == "***"
    assert redact_value("data.root", "s3://a:b@c") == "s3://***@c"
    assert redact_value("raystar.signature", "0123") == "0123"


def test_a_long_text_is_quick_to_read() -> None:
    assert redact("tokentoken." * 20_000 + "a" * 200_000 + " token=x").endswith("token=***")


def test_an_error_line_holds_none(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise RaystarError("http://me:hunter2@host: no")

    with pytest.raises(SystemExit, match="2"):
        run_cli(main)
    assert capsys.readouterr().err == "error: http://***@host: no\n"
