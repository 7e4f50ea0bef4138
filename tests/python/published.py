"""Protocols that others have published, beside our own files of them: what we have must be theirs."""
import google.protobuf.descriptor_pb2 as descriptors
import google.protobuf.descriptor_pool as pools
from grpc_tools import protoc

from conftest import ROOT


def ours(file, out):
    """The file of proto/ as a descriptor pool of its own: its names are those of modules that are loaded already."""
    target = out / "set.binpb"
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", "--include_imports", f"--descriptor_set_out={target}", file]) == 0
    files = descriptors.FileDescriptorSet.FromString(target.read_bytes())
    pool = pools.DescriptorPool()
    for each in files.file:
        pool.Add(each)
    return pool.FindFileByName(file)


def differences(ours, published):
    """What of our file their pool has otherwise, or not at all. Theirs may have more."""
    found = []

    def compare_message(message):
        try:
            theirs = published.FindMessageTypeByName(message.full_name)
        except KeyError:
            found.append(f"{message.full_name} is not published")
            return
        for field in message.fields:
            other = theirs.fields_by_number.get(field.number)
            kind = lambda f: (f.name, f.type, f.is_repeated, f.message_type and f.message_type.full_name,
                              f.enum_type and f.enum_type.full_name, f.containing_oneof and f.containing_oneof.name)
            if other is None or kind(other) != kind(field):
                found.append(f"{field.full_name} = {field.number}: ours {kind(field)}, theirs {other and kind(other)}")
        for nested in message.nested_types:
            compare_message(nested)

    for message in ours.message_types_by_name.values():
        compare_message(message)
    for service in ours.services_by_name.values():
        theirs = published.FindServiceByName(service.full_name)
        for method in service.methods:
            other = theirs.methods_by_name.get(method.name)
            kind = lambda m: (m.input_type.full_name, m.output_type.full_name, m.client_streaming, m.server_streaming)
            if other is None or kind(other) != kind(method):
                found.append(f"{method.full_name} is another one")
    for enum in ours.enum_types_by_name.values():
        theirs = published.FindEnumTypeByName(enum.full_name)
        found += [f"{enum.full_name}.{value.name}" for value in enum.values
                  if value.name not in theirs.values_by_name or theirs.values_by_name[value.name].number != value.number]
    return found
