// Dialect: how one protocol speaks of a generation. It makes a GenerateRequest of our own API of what the protocol
// asks, and the protocol's replies of our chunks. What lies between, from validation to records, is GenerateCall's, the
// same for all of them. One object for one request; no two threads at once.
#ifndef SERVER_API_DIALECT_H_
#define SERVER_API_DIALECT_H_

#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "dejavu/v1/generation.pb.h"
#include "grpcpp/support/byte_buffer.h"
#include "kernels/base/clock.h"

namespace dejavu {

class Dialect {
 public:
  virtual ~Dialect() = default;

  // The request as ours. Its id and text are there as soon as they are known, also where the rest is refused.
  virtual absl::Status Read(const grpc::ByteBuffer& bytes, v1::GenerateRequest* request) = 0;

  // A refusal of what Read has made, with the protocol's own names of fields.
  virtual absl::Status Renamed(absl::Status status) const { return status; }

  // After Read. True: chunks come as they are made; else one for each sample, once it has ended.
  virtual bool streams() const = 0;
  // See RpcHandler::large_replies.
  virtual bool large_replies() const { return false; }
  // After Read: how long the request may take from its arrival on.
  virtual SteadyTime::duration timeout() const { return SteadyTime::duration::max(); }

  // The next chunk of a sample, which stays until the next is taken. May be taken apart.
  virtual void Take(v1::GenerateChunk* chunk) = 0;
  // The next reply to what was taken, valid until the next call; null: there is none. `more`: another one follows.
  virtual const google::protobuf::MessageLite* Next(bool* more) = 0;
  // See RpcHandler::ReleaseReply.
  virtual void Release() {}
};

// The chunks of a request's samples, a whole one each, until one reply can hold them all.
class GatheredSamples {
 public:
  void Expect(size_t samples) { expected_ = samples; }
  size_t expected() const { return expected_; }
  void Take(v1::GenerateChunk* chunk) {
    if (chunk->sample() >= chunks_.size()) chunks_.resize(chunk->sample() + 1);
    chunks_[chunk->sample()].Swap(chunk);
    ++taken_;
  }
  // By sample, once all have come; only then, and once.
  std::vector<v1::GenerateChunk>* All() {
    if (taken_ < expected_) return nullptr;
    taken_ = 0;
    return &chunks_;
  }
  void Release() { chunks_ = std::vector<v1::GenerateChunk>(); }

 private:
  size_t expected_ = 0, taken_ = 0;
  std::vector<v1::GenerateChunk> chunks_;
};

}  // namespace dejavu

#endif  // SERVER_API_DIALECT_H_
