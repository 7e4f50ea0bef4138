#!/usr/bin/env python3
"""Writes the Grafana dashboards in dashboards/. With --check it writes nothing and fails where they are not up to date.

Expressions below name a metric and the labels that matter to the panel. The matchers of the dashboard's variables are added from
the labels that docs/operations/metrics.md documents; a metric that is not there is an error.
"""
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
METRICS = HERE.parents[1] / "docs/operations/metrics.md"
DASHBOARDS = HERE / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24


def documented_labels():
    """Metric name to its own labels."""
    labels = {}
    for name, own in re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram) \| ([\w, ]*)\|", METRICS.read_text(), re.M):
        labels[name] = set(re.findall(r"\w+", own))
    return labels


LABELS = documented_labels()


def selected(expression):
    """`expression` with the variables' matchers in every selector."""

    def add(match):
        name, own = match.groups()
        labels = LABELS.get(name) or LABELS.get(re.sub(r"_(bucket|sum|count)$", "", name))
        if labels is None:
            raise SystemExit(f"{name} is not in {METRICS}")
        variables = ["namespace", "pod"] if "none" in labels else ["namespace", "pod", "model"]
        if "tier" in labels:
            variables.append("tier")
        matchers = [f'{variable}=~"${variable}"' for variable in variables]
        return f"{name}{{{', '.join(matchers + ([own[1:-1]] if own else []))}}}"

    return re.sub(r"\b((?:dejavu|process)_\w+)(\{[^}]*\})?", add, expression)


# What the panels say, in PromQL.


def rate(metric, by=""):
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}[$__rate_interval]))"


def quantile(q, histogram, by=""):
    return f"histogram_quantile({q}, sum by ({', '.join(filter(None, [by, 'le']))}) (rate({histogram}_bucket[$__rate_interval])))"


def mean(histogram, by="", matchers=""):
    return f"{rate(f'{histogram}_sum{matchers}', by)} / {rate(f'{histogram}_count{matchers}', by)}"


def buckets(histogram):
    return f"sum by (le) (increase({histogram}_bucket[$__rate_interval]))"


def own_process(metric):
    """Of dejavud's processes only: process metrics carry no model."""
    return f"{metric} and on (job, instance) dejavu_build_info"


# Panels.


def panel(kind, title, description, targets, unit="short", width=8, height=8, **more):
    custom = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"} if kind == "timeseries" else {}
    custom.update(more.pop("custom", {}))
    defaults = {"unit": unit, "custom": custom}
    defaults.update(more.pop("defaults", {}))
    overrides = more.pop("overrides", [])
    form = "heatmap" if kind == "heatmap" else "time_series"
    result = {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": selected(expression), "legendFormat": legend, "format": form}
            for i, (expression, legend) in enumerate(targets)
        ],
    }
    if kind == "timeseries":
        result["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    result.update(more)
    return result


def lines(title, description, targets, unit="short", **more):
    return panel("timeseries", title, description, targets, unit, **more)


def stacked(title, description, targets, unit="short", **more):
    return lines(title, description, targets, unit, custom={"stacking": {"mode": "normal"}, "fillOpacity": 40}, **more)


def ratio(title, description, targets, **more):
    return lines(title, description, targets, "percentunit", defaults={"min": 0}, **more)


def stat(title, description, targets, unit="short", width=4, **more):
    return panel("stat", title, description, targets, unit, width=width, height=4,
                 options={"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}, **more)


def heatmap(title, description, histogram, unit="s", **more):
    return panel("heatmap", title, description, [(buckets(histogram), "{{le}}")], unit,
                 options={"calculate": False, "yAxis": {"unit": unit}, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                          "cellGap": 1, "tooltip": {"show": True, "yHistogram": True}}, **more)


def table(title, description, targets, **more):
    made = panel("table", title, description, targets, **more)
    for target in made["targets"]:
        target.update({"format": "table", "instant": True})
    made["transformations"] = [{"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True, "__name__": True}}}]
    return made


def right_axis(pattern, unit):
    return {"matcher": {"id": "byRegexp", "options": pattern},
            "properties": [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": unit}]}


def percentiles(title, description, histogram, unit="s", **more):
    return lines(title, description, [(quantile(q / 100, histogram), f"p{q}") for q in (50, 90, 99)], unit, **more)


class Row:
    def __init__(self, title, *panels):
        self.title = title
        self.panels = panels


SERVICE = [
    Row("Now",
        stat("Replicas serving", "Daemons in state serving.", [('sum(dejavu_engine_state{state="serving"})', "serving")]),
        stat("Requests", "Calls that end per second.", [(rate("dejavu_requests_total"), "requests")], "reqps"),
        stat("Output", "Tokens sampled per second.", [(rate("dejavu_generated_tokens_total"), "tokens")], "suffix: tok/s"),
        stat("First token, p99", "99 of 100 requests have their first token within this time.",
             [(quantile(0.99, "dejavu_time_to_first_token_seconds"), "p99")], "s"),
        stat("Between tokens, p99", "99 of 100 gaps between two tokens are no longer.",
             [(quantile(0.99, "dejavu_inter_token_latency_seconds"), "p99")], "s"),
        stat("Refused", "Share of calls that were refused.",
             [(f"{rate('dejavu_requests_rejected_total')} / {rate('dejavu_requests_total')}", "refused")], "percentunit")),
    Row("Traffic",
        stacked("Calls by method", "Calls that ended, by RPC.", [(rate("dejavu_requests_total", "method"), "{{method}}")], "reqps"),
        stacked("Calls by code", "What clients got. INTERNAL, DATA_LOSS and UNKNOWN are ours.",
                [(rate("dejavu_requests_total", "code"), "{{code}}")], "reqps"),
        stacked("Finish reasons", "Why generation ended; none: a call that generates nothing, or was refused.",
                [(rate("dejavu_requests_total", "finish_reason"), "{{finish_reason}}")], "reqps"),
        lines("Tokens", "Prompts that were computed, prompts that the prefix cache held, and output.",
              [(rate("dejavu_prompt_tokens_total"), "prompt"), (rate("dejavu_generated_tokens_total"), "generated"),
               (rate("dejavu_prefix_cache_hit_tokens_total"), "prompt, cached")], "suffix: tok/s"),
        lines("Cancelled", "Ended by clients, aborts or lost connections, by how far they were.",
              [(rate("dejavu_cancelled_total", "stage"), "{{stage}}")], "reqps"),
        lines("Deadlines exceeded", "Ended by their deadline, by how far they were.",
              [(rate("dejavu_deadline_exceeded_total", "stage"), "{{stage}}")], "reqps")),
    Row("Latency",
        percentiles("Time to first token", "From arrival to the first token.", "dejavu_time_to_first_token_seconds"),
        percentiles("Between tokens", "Each gap between two tokens of a sequence.", "dejavu_inter_token_latency_seconds"),
        percentiles("Request duration", "From arrival to the end.", "dejavu_request_duration_seconds"),
        heatmap("Time to first token, heat map", "Requests by time to first token.", "dejavu_time_to_first_token_seconds"),
        heatmap("Between tokens, heat map", "Gaps by length.", "dejavu_inter_token_latency_seconds"),
        percentiles("Time per output token", "A request's mean gap.", "dejavu_time_per_output_token_seconds"),
        lines("First token p99 by priority", "Who waits for whom.",
              [(quantile(0.99, "dejavu_time_to_first_token_seconds", "priority"), "{{priority}}")], "s"),
        lines("Between tokens p99 by tier", "What a tier's users see.",
              [(quantile(0.99, "dejavu_inter_token_latency_seconds", "tier"), "{{tier}}")], "s"),
        lines("Where the time goes", "Mean seconds of a request that waited, computed its prompt, and decoded.",
              [(mean("dejavu_queue_time_seconds"), "queue"), (mean("dejavu_prefill_time_seconds"), "prefill"),
               (mean("dejavu_decode_time_seconds"), "decode")], "s")),
    Row("Speculation",
        ratio("Drafts that were right", "Share of the checked drafts, by the tier that made them or looked up in the text.",
              [(f"{rate('dejavu_speculation_accepted_tokens_total', 'source')} / "
                f"{rate('dejavu_speculation_draft_tokens_total', 'source')}", "{{source}}")], width=6),
        lines("Tokens per round", "What a check gives: drafts that were right, and the token after them.",
              [(f"{rate('dejavu_speculation_tokens_total')} / {rate('dejavu_speculation_rounds_total')}", "tokens")], width=6),
        lines("Time gained", "What the same tokens would have taken without, over what drafts and checks took. Below 1 it costs time.",
              [(f"{rate('dejavu_speculation_plain_seconds_total')} / {rate('dejavu_speculation_seconds_total')}", "times")], width=6),
        ratio("Tokens by speculation", "Share of the tokens that checks gave.",
              [(f"{rate('dejavu_speculation_tokens_total')} / {rate('dejavu_generated_tokens_total')}", "share")], width=6)),
    Row("Goodput (needs metrics.slo_*)",
        ratio("Requests within the target", "Share of finished requests within metrics.slo_*.",
              [(f"{rate('dejavu_slo_attained_total', 'slo')} / ({rate('dejavu_slo_attained_total', 'slo')} + "
                f"{rate('dejavu_slo_missed_total', 'slo')})", "{{slo}}")], width=12),
        lines("Goodput", "Requests per second within the target, and those that missed it.",
              [(rate("dejavu_slo_attained_total", "slo"), "{{slo}} attained"),
               (rate("dejavu_slo_missed_total", "slo"), "{{slo}} missed")], "reqps", width=12)),
    Row("Queue and refusals",
        stacked("Waiting by priority", "Sequences that were admitted and have not begun.",
                [("sum by (priority) (dejavu_requests_waiting)", "{{priority}}")]),
        lines("Oldest in the queue", "How long whoever has waited longest has waited, by replica.",
              [("max by (instance) (dejavu_queue_oldest_age_seconds)", "{{instance}}")], "s"),
        lines("Queued prompt tokens", "Tokens of the prompts that wait, by replica.",
              [("sum by (instance) (dejavu_queue_tokens)", "{{instance}}")]),
        stacked("Refusals by reason", "Requests that were refused at the door.",
                [(rate("dejavu_requests_rejected_total", "reason"), "{{reason}}")], "reqps"),
        percentiles("Time in the queue", "From arrival until it runs.", "dejavu_queue_time_seconds"),
        lines("Running", "Sequences that take part in steps, by replica.",
              [("sum by (instance) (dejavu_requests_running)", "{{instance}}")])),
    Row("Memory, clients, state",
        ratio("KV in use", "Share of the KV blocks in use, by replica.",
              [("max by (instance) (dejavu_kv_utilization_ratio)", "{{instance}}")], width=6),
        stacked("KV blocks", "Cached blocks are free for whoever needs them.",
                [("sum by (state) (dejavu_kv_blocks)", "{{state}}")], width=6),
        ratio("Prefix cache hits", "Share of the looked-up prompt tokens that were found.",
              [(f"{rate('dejavu_prefix_cache_hit_tokens_total')} / {rate('dejavu_prefix_cache_query_tokens_total')}", "hits")], width=6),
        percentiles("Client stall", "How long chunks waited for clients that read slowly.", "dejavu_client_stall_seconds", width=6),
        panel("state-timeline", "Engine state", "The state of each replica. draining: takes nothing new and ends by itself.",
              [("dejavu_engine_state == 1", "{{instance}} {{state}}")], width=16, custom={"fillOpacity": 60}),
        lines("Uptime", "A line that falls is a restart.",
              [(f"time() - ({own_process('process_start_time_seconds')})", "{{instance}}")], "s")),
]

GROUP = "layers, quarter {{layer_group}}"
SPARSITY = [
    Row("What is computed",
        ratio("Neurons read, by layer group", "Union density: share of the MLP's rows that a step reads for all its sequences, by quarter of the depth.",
              [(mean("dejavu_mlp_density_ratio", "layer_group", '{scope="union"}'), GROUP)]),
        ratio("Neurons selected by a request", "Mean density of requests by themselves, and the median request.",
              [(mean("dejavu_mlp_density_ratio", matchers='{scope="request"}'), "mean"),
               (quantile(0.5, "dejavu_mlp_density_ratio").replace("_bucket", '_bucket{scope="request"}'), "p50"),
               (quantile(0.99, "dejavu_mlp_density_ratio").replace("_bucket", '_bucket{scope="request"}'), "p99")]),
        lines("Union inflation by batch", "Neurons that a step selects over the mean of its rows: what batching costs.",
              [(mean("dejavu_union_inflation_ratio", "batch"), "batch {{batch}}")]),
        ratio("Heads read, by layer group", "Share of the heads that a step reads for all its rows.",
              [(mean("dejavu_attention_head_density_ratio", "layer_group", '{scope="union"}'), GROUP)]),
        ratio("Heads selected by a request", "Mean share of heads of requests by themselves.",
              [(mean("dejavu_attention_head_density_ratio", matchers='{scope="request"}'), "mean")]),
        ratio("Density by layer", "Share of the neurons that predicted rows selected, since start. Needs metrics.per_layer.",
              [("avg by (layer) (dejavu_layer_density_ratio)", "{{layer}}")])),
    Row("How good the prediction is (shadow checks)",
        ratio("Recall", "Active neurons that were selected, over all active ones.",
              [(mean("dejavu_predictor_recall_ratio", "layer_group"), GROUP)]),
        ratio("Precision", "Selected neurons that were active, over all selected.",
              [(mean("dejavu_predictor_precision_ratio", "layer_group"), GROUP)]),
        ratio("Missed mass", "Squared output of the neurons left out, over that of all.",
              [(mean("dejavu_predictor_missed_mass_ratio", "layer_group"), GROUP)]),
        ratio("Disagreement with dense", "Share of shadow tokens whose most likely token is another one.",
              [(f"{rate('dejavu_shadow_top1_disagree_total', 'tier')} / {rate('dejavu_shadow_tokens_total', 'tier')}", "{{tier}}")]),
        lines("Divergence from dense", "Mean KL of the next-token distribution.",
              [(mean("dejavu_shadow_kl_nats", "tier"), "{{tier}}")], "suffix: nats"),
        lines("Shadow checks", "Tokens that are computed twice. Few checks make the figures beside it coarse.",
              [(rate("dejavu_shadow_tokens_total", "tier"), "{{tier}}")], "suffix: tok/s"),
        lines("Layers fallen back", "Layers that run EXACT because their checks failed.",
              [("sum by (tier, instance) (dejavu_fallback_layers)", "{{tier}} {{instance}}")]),
        lines("Fallbacks and recoveries", "Layers per hour that went EXACT, and that came back.",
              [(f"3600 * {rate('dejavu_dense_fallback_total', 'reason')}", "fallback, {{reason}}"),
               (f"3600 * {rate('dejavu_fallback_recoveries_total')}", "recovery")]),
        ratio("Recall by layer", "Since start. Needs metrics.per_layer.", [("avg by (layer) (dejavu_layer_recall_ratio)", "{{layer}}")])),
    Row("What it saves",
        stacked("Weight bytes read, by kind", "What steps read per second; prompts read everything.",
                [(rate("dejavu_weight_bytes_read_total", "kind"), "{{kind}}")], "Bps"),
        ratio("Weight bytes saved", "Bytes that decode steps did not read, over what all steps would have read without that.",
              [(f"{rate('dejavu_weight_bytes_saved_total')} / ({rate('dejavu_weight_bytes_saved_total')} + "
                f"{rate('dejavu_weight_bytes_read_total')})", "saved")]),
        lines("Weight bytes per token", "Read per token sampled: batching divides it, density too; prompts add to it.",
              [(f"{rate('dejavu_weight_bytes_read_total')} / {rate('dejavu_generated_tokens_total')}", "read")], "bytes"),
        lines("Bandwidth", "What decode steps reach, and what the device was measured to give at start.",
              [("sum by (instance) (dejavu_effective_bandwidth_bytes_per_second)", "effective {{instance}}"),
               ("sum by (instance) (dejavu_measured_bandwidth_bytes_per_second)", "measured {{instance}}")], "Bps", width=12),
        lines("Latency against density", "Median gap between tokens by tier (left), mean union density (right): they move together where memory is the limit.",
              [(quantile(0.5, "dejavu_inter_token_latency_seconds", "tier"), "gap {{tier}}"),
               (mean("dejavu_mlp_density_ratio", matchers='{scope="union"}'), "density of neurons"),
               (mean("dejavu_attention_head_density_ratio", matchers='{scope="union"}'), "density of heads")],
              "s", width=12, overrides=[right_axis("density.*", "percentunit")])),
]

ENGINE = [
    Row("Steps",
        lines("Step duration by phase", "Median and p99.",
              [(quantile(0.5, "dejavu_step_duration_seconds", "phase"), "p50 {{phase}}"),
               (quantile(0.99, "dejavu_step_duration_seconds", "phase"), "p99 {{phase}}")], "s"),
        heatmap("Step duration, heat map", "Steps by duration.", "dejavu_step_duration_seconds"),
        stacked("Where a step's time goes", "Seconds per second by component; what is missing to 1 is idle.",
                [(rate("dejavu_step_component_seconds_sum", "component"), "{{component}}")], "percentunit"),
        lines("Component of a step", "Mean time of each part.", [(mean("dejavu_step_component_seconds", "component"), "{{component}}")], "s"),
        lines("Steps per second", "By phase.", [(rate("dejavu_step_duration_seconds_count", "phase"), "{{phase}}")], "ops"),
        lines("Batch size", "Sequences that decode in a step.",
              [(mean("dejavu_batch_size"), "mean"), (quantile(0.9, "dejavu_batch_size"), "p90")]),
        lines("Step tokens", "Tokens that a step computes.",
              [(mean("dejavu_step_tokens"), "mean"), (quantile(0.99, "dejavu_step_tokens"), "p99")]),
        lines("Preemptions", "Sequences per minute that gave their blocks back; only with kv.overcommit.",
              [(f"60 * {rate('dejavu_preemptions_total', 'instance')}", "{{instance}}")]),
        lines("Saturated keys and values", "Numbers per minute beyond the range of kv.dtype; anything but 0 means that texts may be wrong: set kv.dtype to fp32.",
              [(f"60 * {rate('dejavu_kv_saturated_values_total', 'instance')}", "{{instance}}")]),
        lines("Running and waiting", "Sequences, all replicas.",
              [("sum(dejavu_requests_running)", "running"), ("sum(dejavu_requests_waiting)", "waiting")])),
    Row("Ranks (only where several hold the model)",
        lines("Imbalance of ranks", "Active neurons of the busiest rank over the mean; 1 is even.",
              [(mean("dejavu_rank_imbalance_ratio", "instance"), "mean {{instance}}"),
               (quantile(0.99, "dejavu_rank_imbalance_ratio", "instance"), "p99 {{instance}}")]),
        ratio("Time in all-reduces", "Share of the time that rank 0 spends adding up over ranks and waiting for them.",
              [(rate("dejavu_all_reduce_seconds_total", "instance"), "{{instance}}")]),
        lines("All-reduce", "Mean time of one.",
              [(f"{rate('dejavu_all_reduce_seconds_total', 'instance')} / {rate('dejavu_all_reduces_total', 'instance')}",
                "{{instance}}")], "s")),
    Row("Process",
        lines("CPU", "Processors in use.", [(own_process("rate(process_cpu_seconds_total[$__rate_interval])"), "{{instance}}")], width=6),
        lines("Memory", "Resident, and the weights of it.",
              [(own_process("process_resident_memory_bytes"), "resident {{instance}}"), ("dejavu_weight_bytes", "weights {{instance}}"),
               ("dejavu_draft_weight_bytes", "weights for drafts {{instance}}")],
              "bytes", width=6),
        lines("Open files", "Descriptors; a connection is one.", [(own_process("process_open_fds"), "{{instance}}")], width=6),
        lines("Observability's own losses", "Lines and spans dropped per second, and spans delivered.",
              [(rate("dejavu_log_lines_dropped_total"), "log lines dropped"), (rate("dejavu_trace_spans_dropped_total"), "spans dropped"),
               (rate("dejavu_trace_spans_exported_total"), "spans exported")], "cps", width=6),
        stat("Model load", "Reading the weights, and the first steps.", [("max by (stage) (dejavu_model_load_seconds)", "{{stage}}")], "s", width=8),
        stat("Certificate's life", "Left to the server's certificate; empty without TLS.",
             [("dejavu_tls_certificate_expiry_timestamp_seconds - time()", "{{instance}}")], "s", width=8),
        lines("Credentials", "Certificates and tokens that were taken while the daemon ran, and those that were refused.",
              [("sum(increase(dejavu_credential_reloads_total[$__rate_interval]))", "taken"),
               ("sum(increase(dejavu_credential_reload_failures_total[$__rate_interval]))", "refused")], width=8),
        lines("Connections and calls", "Open ones of clients; ports of operators and probes count among the connections.",
              [("dejavu_connections", "connections {{instance}}"), ("dejavu_open_calls", "calls {{instance}}")], width=8),
        lines("Connections turned away", "Refused, or closed from here, per second, by the limit that they met.",
              [(f"sum by (reason) (rate(dejavu_connections_refused_total[$__rate_interval]))", "refused: {{reason}}"),
               (f"sum by (reason) (rate(dejavu_connections_closed_total[$__rate_interval]))", "closed: {{reason}}")], "cps", width=8),
        lines("Large requests", "Above 8 KiB, per second, and the bytes that wait to be read and tokenised.",
              [(rate("dejavu_large_requests_total"), "taken"), (rate("dejavu_large_requests_refused_total"), "refused"),
               ("dejavu_large_requests_waiting_bytes", "waiting bytes {{instance}}")], width=8),
        lines("Replies that nobody reads", "Bytes that gRPC holds, and what the process may hold beside mapped files before the worst "
              "connections are closed.",
              [("dejavu_unread_bytes", "unread {{instance}}"), ("dejavu_memory_bound_bytes", "bound {{instance}}")], "bytes", width=8),
        lines("Tenants: tokens", "With metrics.tenants. Prompts and outputs, per second.",
              [("sum by (tenant) (rate(dejavu_tenant_prompt_tokens_total[$__rate_interval]))", "prompts {{tenant}}"),
               ("sum by (tenant) (rate(dejavu_tenant_generated_tokens_total[$__rate_interval]))", "outputs {{tenant}}")], width=8),
        lines("Tenants: calls", "With metrics.tenants. Calls that ended, per second, and requests refused by a quota.",
              [("sum by (tenant, code) (rate(dejavu_tenant_requests_total[$__rate_interval]))", "{{tenant}} {{code}}"),
               ("sum by (tenant) (rate(dejavu_tenant_quota_refusals_total[$__rate_interval]))", "{{tenant}} over quota")], "cps", width=8),
        table("Builds", "What runs where.", [("dejavu_build_info", "")], width=8, height=6),
        table("Models", "What is served where.", [("dejavu_model_info", "")], width=8, height=6)),
    Row("GPU (GPU-only: where NVML can be loaded)",
        lines("GPU memory", "GPU-only. In use, of all processes.", [("dejavu_gpu_memory_used_bytes", "{{instance}} {{gpu}}")], "bytes"),
        ratio("GPU utilization", "GPU-only. Share of the time in which a kernel ran; says little about how well.",
              [("dejavu_gpu_utilization_ratio", "{{instance}} {{gpu}}")]),
        lines("GPU power", "GPU-only.", [("dejavu_gpu_power_watts", "{{instance}} {{gpu}}")], "watt"),
        lines("Energy per token", "GPU-only. Joules of all GPUs over tokens sampled.",
              [(f"{rate('dejavu_gpu_energy_joules_total')} / {rate('dejavu_generated_tokens_total')}", "energy")], "joule", width=12),
        lines("ECC errors", "GPU-only. Since the last minutes; any is worth a look.",
              [("increase(dejavu_gpu_ecc_errors_total[$__rate_interval])", "{{instance}} {{gpu}}")], width=12)),
]


def variable(name, query, label):
    return {"name": name, "label": label, "type": "query", "datasource": DATASOURCE, "query": {"query": query, "refId": name},
            "definition": query, "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}


def laid_out(rows):
    panels = []
    y = 0
    for row in rows:
        panels.append({"type": "row", "title": row.title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        y += 1
        x = line = 0
        for each in row.panels:
            place = each["gridPos"]
            if x + place["w"] > WIDTH:
                x, y, line = 0, y + line, 0
            panels.append({**each, "gridPos": {"x": x, "y": y, **place}})
            x += place["w"]
            line = max(line, place["h"])
        y += line
    return [{"id": i + 1, **each} for i, each in enumerate(panels)]


def dashboard(name, title, rows):
    metric = "dejavu_build_info"
    names = {"service": "Service", "sparsity": "Sparsity", "engine": "Engine/GPU"}
    return {
        "uid": f"dejavu-{name}",
        "title": f"dejavud / {title}",
        "tags": ["dejavud"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [{"type": "link", "title": names[other], "url": f"/d/dejavu-{other}", "keepTime": True, "includeVars": True,
                   "icon": "dashboard", "tags": [], "targetBlank": False, "asDropdown": False, "tooltip": ""}
                  for other in names if other != name],
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
            variable("namespace", f"label_values({metric}, namespace)", "Namespace"),
            variable("pod", f'label_values({metric}{{namespace=~"$namespace"}}, pod)', "Pod"),
            variable("model", f'label_values({metric}{{namespace=~"$namespace", pod=~"$pod"}}, model)', "Model"),
            variable("tier", 'label_values(dejavu_time_to_first_token_seconds_count{model=~"$model"}, tier)', "Tier"),
        ]},
        "panels": laid_out(rows),
    }


def main():
    made = {"service": dashboard("service", "Service", SERVICE), "sparsity": dashboard("sparsity", "Sparsity", SPARSITY),
            "engine": dashboard("engine", "Engine and GPU", ENGINE)}
    stale = []
    for name, content in made.items():
        path = DASHBOARDS / f"{name}.json"
        text = json.dumps(content, indent=1) + "\n"
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(str(path))
    if stale:
        raise SystemExit(f"not what {pathlib.Path(__file__).name} writes: {', '.join(stale)}")


if __name__ == "__main__":
    main()
