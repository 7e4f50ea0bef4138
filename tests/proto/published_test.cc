// Clients outlive servers: whatever has been published keeps its name, number, type and meaning. published.binpb holds
// the published API; new fields are added to it on purpose, by
//   protoc -Iproto --descriptor_set_out=tests/proto/published.binpb dejavu/v1/generation.proto dejavu/v1/admin.proto
#include <fstream>
#include <sstream>
#include <string>

#include "dejavu/v1/admin.pb.h"
#include "dejavu/v1/generation.pb.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/descriptor.pb.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

namespace pb = google::protobuf;

// Of each file.
class PublishedApi : public testing::TestWithParam<const pb::FileDescriptor*> {
 protected:
  PublishedApi() {
    std::ifstream in(PUBLISHED_API, std::ios::binary);
    std::stringstream bytes;
    bytes << in.rdbuf();
    pb::FileDescriptorSet set;
    if (!set.ParseFromString(bytes.str())) return;
    for (const auto& file : set.file()) pool_.BuildFile(file);
    published_ = pool_.FindFileByName(current_.name());
  }

  const pb::FileDescriptor& current_ = *GetParam();
  pb::DescriptorPool pool_;
  const pb::FileDescriptor* published_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Files, PublishedApi,
                         testing::Values(v1::GenerateRequest::descriptor()->file(),
                                         v1::ProfileRequest::descriptor()->file()));

void ExpectSameField(const pb::FieldDescriptor& published, const pb::Descriptor& message) {
  const pb::FieldDescriptor* field = message.FindFieldByNumber(published.number());
  ASSERT_NE(field, nullptr) << published.full_name() << " = " << published.number() << " was removed";
  EXPECT_EQ(field->name(), published.name()) << published.full_name() << " was renamed";
  EXPECT_EQ(field->type(), published.type()) << published.full_name();
  EXPECT_EQ(field->label(), published.label()) << published.full_name();
  EXPECT_EQ(field->has_optional_keyword(), published.has_optional_keyword()) << published.full_name();
  const auto oneof = [](const pb::FieldDescriptor& f) {
    return f.real_containing_oneof() == nullptr ? "" : f.real_containing_oneof()->name();
  };
  EXPECT_EQ(oneof(*field), oneof(published)) << published.full_name();
  if (published.message_type() != nullptr) {
    EXPECT_EQ(field->message_type()->full_name(), published.message_type()->full_name()) << published.full_name();
  }
  if (published.enum_type() != nullptr) {
    EXPECT_EQ(field->enum_type()->full_name(), published.enum_type()->full_name()) << published.full_name();
  }
}

void ExpectSameMessage(const pb::Descriptor& published, const pb::Descriptor& message) {
  for (int f = 0; f < published.field_count(); ++f) ExpectSameField(*published.field(f), message);
  for (int n = 0; n < published.nested_type_count(); ++n) {
    const pb::Descriptor* nested = message.FindNestedTypeByName(published.nested_type(n)->name());
    ASSERT_NE(nested, nullptr) << published.nested_type(n)->full_name() << " was removed";
    ExpectSameMessage(*published.nested_type(n), *nested);
  }
}

TEST_P(PublishedApi, KeepsEveryMessageFieldAndEnumValue) {
  ASSERT_NE(published_, nullptr) << PUBLISHED_API;
  ASSERT_GT(published_->message_type_count(), 0);
  for (int m = 0; m < published_->message_type_count(); ++m) {
    const pb::Descriptor& published = *published_->message_type(m);
    const pb::Descriptor* message = current_.FindMessageTypeByName(published.name());
    ASSERT_NE(message, nullptr) << published.full_name() << " was removed";
    ExpectSameMessage(published, *message);
  }
  for (int e = 0; e < published_->enum_type_count(); ++e) {
    const pb::EnumDescriptor& published = *published_->enum_type(e);
    const pb::EnumDescriptor* current = current_.FindEnumTypeByName(published.name());
    ASSERT_NE(current, nullptr) << published.full_name() << " was removed";
    for (int v = 0; v < published.value_count(); ++v) {
      const pb::EnumValueDescriptor* value = current->FindValueByNumber(published.value(v)->number());
      ASSERT_NE(value, nullptr) << published.value(v)->full_name() << " was removed";
      EXPECT_EQ(value->name(), published.value(v)->name());
    }
  }
}

TEST_P(PublishedApi, KeepsEveryMethod) {
  ASSERT_NE(published_, nullptr) << PUBLISHED_API;
  ASSERT_EQ(published_->service_count(), 1);
  const pb::ServiceDescriptor& published = *published_->service(0);
  const pb::ServiceDescriptor* service = current_.FindServiceByName(published.name());
  ASSERT_NE(service, nullptr);
  EXPECT_EQ(service->full_name(), published.full_name());
  for (int m = 0; m < published.method_count(); ++m) {
    const pb::MethodDescriptor& method = *published.method(m);
    const pb::MethodDescriptor* current = service->FindMethodByName(method.name());
    ASSERT_NE(current, nullptr) << method.full_name() << " was removed";
    EXPECT_EQ(current->input_type()->full_name(), method.input_type()->full_name());
    EXPECT_EQ(current->output_type()->full_name(), method.output_type()->full_name());
    EXPECT_EQ(current->client_streaming(), method.client_streaming());
    EXPECT_EQ(current->server_streaming(), method.server_streaming());
  }
}

void ExpectPublished(const pb::Descriptor& message, const pb::Descriptor& published) {
  for (int f = 0; f < message.field_count(); ++f) {
    EXPECT_NE(published.FindFieldByNumber(message.field(f)->number()), nullptr) << message.field(f)->full_name();
  }
  for (int n = 0; n < message.nested_type_count(); ++n) {
    const pb::Descriptor* nested = published.FindNestedTypeByName(message.nested_type(n)->name());
    ASSERT_NE(nested, nullptr) << message.nested_type(n)->full_name() << " is not in published.binpb";
    ExpectPublished(*message.nested_type(n), *nested);
  }
}

// What the server understands but nobody published could change unnoticed.
TEST_P(PublishedApi, HoldsEveryFieldAndEnumValueOfTheCurrentApi) {
  ASSERT_NE(published_, nullptr) << PUBLISHED_API;
  for (int m = 0; m < current_.message_type_count(); ++m) {
    const pb::Descriptor& message = *current_.message_type(m);
    const pb::Descriptor* published = published_->FindMessageTypeByName(message.name());
    ASSERT_NE(published, nullptr) << message.full_name() << " is not in published.binpb";
    ExpectPublished(message, *published);
  }
  for (int e = 0; e < current_.enum_type_count(); ++e) {
    const pb::EnumDescriptor& current = *current_.enum_type(e);
    const pb::EnumDescriptor* published = published_->FindEnumTypeByName(current.name());
    ASSERT_NE(published, nullptr) << current.full_name() << " is not in published.binpb";
    for (int v = 0; v < current.value_count(); ++v) {
      EXPECT_NE(published->FindValueByNumber(current.value(v)->number()), nullptr) << current.value(v)->full_name();
    }
  }
}

}  // namespace
}  // namespace dejavu
