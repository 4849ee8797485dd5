"""What an operator does to let clients on machines of their own take part: the commands, in order."""

from __future__ import annotations

import shlex

from manylora.federated.config import FederateConfig

_RECIPE = """\
# Flower on every machine (Python 3.11 or later), in an environment of its own:
pip install 'manylora[flower]'
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

# 1. On the server: an authority of your own, and the SuperLink's certificate, for the name that nodes call it by.
mkdir -p certs keys
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \\
  -subj "/CN=manylora authority" -keyout certs/ca.key -out certs/ca.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \\
  -subj {subject} -keyout certs/server.key -out certs/server.csr
echo {names} > certs/server.ext
openssl x509 -req -in certs/server.csr -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial -days 365 \\
  -extfile certs/server.ext -out certs/server.crt

# 2. At each client, here "ada": its key. The private one stays there; ada.pub goes into the server's keys/, and the
#    server's certs/ca.crt to the client.
ssh-keygen -t ecdsa -b 384 -N "" -f ada

# 3. On the server: the SuperLink. It listens on this machine alone: its control interface knows no accounts and shares
#    the nodes' port. For other machines put a proxy before it that passes only the paths under /v1/fleet/.
flower-superlink --isolation process --enable-supernode-auth --host 127.0.0.1 --port {port} \\
  --ssl-certfile certs/server.crt --ssl-keyfile certs/server.key --ssl-ca-certfile certs/ca.crt

# 4. On the server: the run. It registers the keys and waits for the clients.
manylora federate --engine flower --superlink {superlink} --certificate certs/ca.crt --node-keys keys{clients}

# 5. At each client: its SuperNode, which is told who it is and where its rows are, and its worker. Once killed, a
#    SuperNode cannot come back before the SuperLink has noticed, which takes a minute: hence the loop.
until flower-supernode --isolation process --root-certificates ca.crt --superlink {superlink} \\
  --auth-supernode-private-key ada --port 9094 \\
  --node-config 'client="ada" data="/srv/rows" model="/srv/base" home="/srv/manylora"'; do sleep 3; done &
manylora federate --node 127.0.0.1:9094
"""


def recipe(config: FederateConfig) -> str:
    """The commands for the SuperLink that `config` names."""
    host, _, port = (config.superlink or "").rpartition(":")
    kind = "IP" if host.replace(".", "").isdecimal() or ":" in host else "DNS"
    host = host.strip("[]")
    return _RECIPE.format(
        subject=shlex.quote(f"/CN={host}"),
        names=shlex.quote(f"subjectAltName={kind}:{host},DNS:localhost,IP:127.0.0.1"),
        port=port,
        superlink=shlex.quote(str(config.superlink)),
        clients=f" --clients {config.clients}" if config.clients else "",
    )
