#!/usr/bin/env python3
"""Writes prometheus-rule.yaml from deploy/monitoring/rules, which are the source: kustomize cannot embed files in a resource."""
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
RULES = HERE.parents[2] / "monitoring/rules"
HEAD = """\
# Written by make_prometheus_rule.py from deploy/monitoring/rules: change those.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: dejavud
spec:
  groups:
"""


def made():
    """The text of prometheus-rule.yaml."""
    text = HEAD
    for name in ("recording.yaml", "alerts.yaml"):
        lines = (RULES / name).read_text().splitlines()
        groups = lines[lines.index("groups:") + 1:]
        # Names of groups are unique within one object; both files have a dejavu-service.
        prefix = name.removesuffix(".yaml")
        text += "".join(f"  {line}".replace("- name: dejavu-", f"- name: dejavu-{prefix}-").rstrip() + "\n"
                        for line in groups)
    return text


if __name__ == "__main__":
    (HERE / "prometheus-rule.yaml").write_text(made())
