#include "tests/bench/scraper.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>

#include "tests/bench/processor_time.h"

namespace dejavu {
namespace {

void Fetch(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  constexpr char kRequest[] = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  char buffer[1 << 16];
  if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0 && write(fd, kRequest, sizeof kRequest - 1) > 0) {
    while (read(fd, buffer, sizeof buffer) > 0) continue;
  }
  close(fd);
}

}  // namespace

Scraper::~Scraper() {
  {
    MutexLock lock(mutex_);
    stop_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

double Scraper::CpuMs(int port) {
  constexpr int kScrapes = 200;
  Fetch(port);
  const double start = ProcessorMs(CLOCK_PROCESS_CPUTIME_ID), own = ProcessorMs(CLOCK_THREAD_CPUTIME_ID);
  for (int i = 0; i < kScrapes; ++i) Fetch(port);
  const double whole = ProcessorMs(CLOCK_PROCESS_CPUTIME_ID) - start;
  return (whole - (ProcessorMs(CLOCK_THREAD_CPUTIME_ID) - own)) / kScrapes;
}

void Scraper::Scrape(int port, SteadyTime::duration interval) {
  SteadyTime next = std::chrono::steady_clock::now();
  MutexLock lock(mutex_);
  while (!stop_) {
    Fetch(port);
    next += interval;
    while (!stop_ && std::chrono::steady_clock::now() < next) changed_.WaitUntil(mutex_, next);
  }
}

}  // namespace dejavu
