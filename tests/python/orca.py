"""Load reports as gRPC's proposals A51 and A58 have them: the modules of proto/xds, and what a call's trailers hold."""
import base64

import http2
from conftest import PATIENCE_S, compile_protos

TRAILER = "endpoint-load-metrics-bin"
SERVICE = "xds.service.orca.v3.OpenRcaService"
FILES = ["xds/data/orca/v3/orca_load_report.proto", "xds/service/orca/v3/orca.proto"]


def generate(out):
    """OrcaLoadReport, OrcaLoadReportRequest and the stub's class. `out`: a folder for the modules."""
    compile_protos(out, *FILES)
    from xds.data.orca.v3 import orca_load_report_pb2
    from xds.service.orca.v3 import orca_pb2, orca_pb2_grpc
    return orca_load_report_pb2.OrcaLoadReport, orca_pb2.OrcaLoadReportRequest, orca_pb2_grpc.OpenRcaServiceStub


def call(address, path, message, metadata=()):
    """The ended stream of a call by hand: gRPC's libraries keep the report in its trailers to themselves."""
    with http2.Connection(address, patience_s=PATIENCE_S) as connection:
        return connection.outcome(connection.call(path, message.SerializeToString(), metadata))


def reports_in(stream):
    """The bytes of the reports in the stream's trailers."""
    return [base64.b64decode(value + "=" * (-len(value) % 4)) for key, value in stream.headers if key == TRAILER]
