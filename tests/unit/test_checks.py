"""What `switchyard serve` finds before it starts anything: messages that say what to do."""

import json
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import yaml

from cluster.config import parse_settings, setting_names
from cluster.errors import ConfigError
from cluster.tls import make_certificate
from ops.checks import check_compiler, check_gpus, check_memory
from ops.cli import main
from ops.exposure import checked_pem, with_checked_exposure
from ops.haproxy import Entry, unavailable_page, write_launcher
from ops.ports import check_port, free_block, free_ports
from ops.serve_config import ServeConfig, parse_serve_config, read_serve_config
from ops.startup import count_stages, failure_message, last_words
from tests.serving import ROOT

GIB = 1 << 30


def plan(**args):
    settings = parse_settings({"model": "m", **args})
    return SimpleNamespace(settings=settings, spec=object(), checkpoint_bytes=12 * GIB, expert_bytes=10 * GIB)


def document(**changes):
    app = {"name": "switchyard", "import_path": "deployments.app:build_app", "args": {"model": "demo"}}
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [app], **changes}


def test_memory_counts_copies_engines_and_processes():
    check_memory(plan(), available_bytes=24 * GIB)
    with pytest.raises(ConfigError, match=r"not enough memory: 24.0 GiB are free, about 29.2 GiB are needed"):
        check_memory(plan(replicas=2), available_bytes=24 * GIB)
    with pytest.raises(ConfigError, match=r"KV cache 20\.0"):
        check_memory(plan(engine={"kv_cache_gib": 20}), available_bytes=24 * GIB)


def test_gpus_that_are_not_there_are_missed_before_ray_waits_for_them():
    check_gpus(plan(workers=2), num_gpus=0)
    check_gpus(plan(workers=2), num_gpus=3)
    check_gpus(plan(workers=2, worker={"num_gpus": 0}), num_gpus=1)
    check_gpus(plan(workers=2, spares=2, engine={"num_gpus": 0}, worker={"num_gpus": 0.25}), num_gpus=1)
    with pytest.raises(ConfigError, match=r"1 here, but the engines reserve 1 and the workers 2\. worker\.num_gpus 0"):
        check_gpus(plan(workers=2), num_gpus=1)
    with pytest.raises(ConfigError, match=r"0 here, but the engines reserve 2"):
        check_gpus(plan(engines=2, engine={"num_gpus": 1}), num_gpus=0)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler was not found"):
        check_compiler(plan())
    check_compiler(plan(engine={"enforce_eager": True}))


def test_a_busy_port_is_found_before_anything_starts():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ConfigError, match="--port"):
            check_port("127.0.0.1", busy.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen on"):
        check_port("192.0.2.77", 8000)
    check_port("127.0.0.1", free_ports(1)[0])


def test_a_block_of_ports_is_free_and_in_one_piece():
    first, last = free_block(50)
    assert last - first == 49 and first >= 20_000
    for port in (first, last):
        check_port("127.0.0.1", port)


def test_the_config_file_of_the_repository_has_every_setting_with_its_default():
    config = read_serve_config(ROOT / "ray-config.yaml")
    assert parse_settings(config.args) == parse_settings({"model": "demo"})
    written = yaml.safe_load((ROOT / "ray-config.yaml").read_text())["applications"][0]["args"]

    def names(values: dict, prefix: str = "") -> Iterator[str]:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                yield from names(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    assert set(names(written)) == set(setting_names())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"http_option": {}}, "no setting http_option. The nearest is http_options"),
        ({"http_options": {"prot": 1}}, "The nearest is port"),
        ({"http_options": {"port": "8000"}}, "a port number"),
        ({"http_options": {"port": 0}}, "a port number"),
        ({"http_options": {"host": 5}}, "must be an address"),
        ({"applications": []}, "one application"),
        ({"applications": [{"import_path": "other:app", "args": {}}]}, "import_path"),
        ({"applications": [{"import_path": "deployments.app:build_app"}]}, "args: must be a mapping"),
        ({"applications": [{**document()["applications"][0], "deployments": [{}]}]}, "serve run"),
    ],
)
def test_a_config_file_with_something_nobody_reads_is_refused(changes, words):
    with pytest.raises(ConfigError) as raised:
        parse_serve_config({**document(), **changes})
    assert words in str(raised.value)


def test_unreadable_config_files_exit_with_status_2(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    assert main(["serve", "--config", str(broken)]) == 2
    assert main(["serve", "--config", str(tmp_path / "missing.yaml")]) == 2
    assert main(["serve", "--config", str(ROOT / "ray-config.yaml"), "--workers", "0"]) == 2
    words = capsys.readouterr().err
    assert "not valid YAML" in words and "No such file" in words and "workers: is 0, must be 1 or more" in words


def test_the_haproxy_launcher_corrects_the_config_file(tmp_path):
    import subprocess

    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "    http-reuse always\n    option splice-request\n"
        "    bind :9101\n    bind *:8000\n  bind *:8404\n    errorfile 503 /x/500.http\n"
    )
    launcher = write_launcher(tmp_path, "/bin/true", Entry("127.0.0.1", 8000), (9101, 8404))
    assert subprocess.run([launcher, "-db", "-f", config], check=True).returncode == 0
    page = tmp_path / "unavailable.http"
    assert config.read_text() == (
        "    http-reuse always\n    http-response return status 503 default-errorfiles "
        "if { status 500 } { res.hdr(content-type) -m beg text/plain }\n"
        f"    bind 127.0.0.1:9101\n    bind *:8000\n  bind 127.0.0.1:8404\n    errorfile 503 {page}\n"
    )


def test_with_a_certificate_the_http_port_alone_speaks_tls(tmp_path):
    import subprocess

    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind 127.0.0.1:8000\n    bind x\n"
        "listen stats\n  bind *:8404\n"
    )
    launcher = write_launcher(tmp_path, "/bin/true", Entry("192.0.2.7", 8443, b"certificate and key"), (9101, 8404))
    for _ in range(2):  # Serve may start it again with the same file
        assert subprocess.run([launcher, "-db", "-f", config], check=True).returncode == 0
    pem = tmp_path / "http.pem"
    assert config.read_text() == (
        "frontend prometheus\n    bind 127.0.0.1:9101\nfrontend http_frontend\n"
        f"    bind 192.0.2.7:8443 ssl crt {pem} alpn http/1.1 ssl-min-ver TLSv1.2\n    bind x\n"
        "listen stats\n  bind 127.0.0.1:8404\n"
    )
    assert pem.read_bytes() == b"certificate and key" and pem.stat().st_mode & 0o777 == 0o600


def test_other_machines_get_in_with_a_key_or_when_that_was_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    here, there = ServeConfig(), ServeConfig(host="0.0.0.0")
    assert with_checked_exposure(here) == here
    with pytest.raises(ConfigError, match=r"on 0\.0\.0\.0 other machines .* --allow-anonymous"):
        with_checked_exposure(there)
    anonymous = ServeConfig(host="0.0.0.0", args={"model": "demo", "allow_anonymous": True})
    assert with_checked_exposure(anonymous) == anonymous
    assert main(["keys", "add", "alice"]) == 0
    keys = str(tmp_path / "switchyard" / "keys.json")
    assert with_checked_exposure(there).args["api_keys"] == keys
    assert with_checked_exposure(here) == here  # on loopback only where it is asked for
    asked = ServeConfig(args={"model": "demo", "api_keys": keys})
    assert with_checked_exposure(asked) == asked
    assert main(["keys", "revoke", "alice"]) == 0
    for config in (there, asked):
        with pytest.raises(ConfigError, match="no valid API key"):
            with_checked_exposure(config)


def test_a_certificate_that_does_not_fit_its_key_is_refused(tmp_path):
    certificate, other = make_certificate(), make_certificate()
    key = other[other.index(b"-----BEGIN PRIVATE KEY") :]
    (tmp_path / "cert").write_bytes(certificate)
    (tmp_path / "key").write_bytes(key)
    config = ServeConfig(tls_cert=str(tmp_path / "cert"), tls_key=str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="belong together"):
        checked_pem(config)
    (tmp_path / "cert").write_bytes(other)
    assert checked_pem(config).count(b"-----BEGIN") == 3
    assert checked_pem(ServeConfig()) is None
    for half in (ServeConfig(tls_cert="c"), ServeConfig(tls_key="k")):
        with pytest.raises(ConfigError, match="--tls-cert and --tls-key"):
            checked_pem(half)


def test_the_page_for_no_engine_is_a_complete_response():
    head, body = unavailable_page().split("\r\n\r\n")
    assert head.startswith("HTTP/1.1 503 ") and "Retry-After: 5" in head
    assert f"Content-Length: {len(body)}" in head
    assert json.loads(body)["error"]["code"] == 503


def test_progress_and_last_words():
    assert count_stages([], 2) == "0 of 2 ready, starting"
    assert count_stages(["ready", "reading 4 of 8 experts per layer"], 2) == (
        "1 of 2 ready, reading 4 of 8 experts per layer"
    )
    traceback = "Traceback ..\n  File x\ncluster.errors.CheckpointError: no config.json\n"
    assert last_words(traceback) == "no config.json"
    assert last_words("") == "no reason was given"
    deployment = SimpleNamespace(name="engine", status=SimpleNamespace(value="DEPLOY_FAILED"), message=traceback)
    application = SimpleNamespace(status=SimpleNamespace(value="DEPLOYING"), message="")
    found = SimpleNamespace(app_status=application, deployment_statuses=[deployment])
    assert failure_message(found) == "engine did not start: no config.json"
    deployment.status.value, deployment.message = "UPDATING", ""
    assert failure_message(found) is None
    application.status.value, application.message = "DEPLOY_FAILED", traceback
    assert failure_message(found) == "the application did not start: no config.json"
