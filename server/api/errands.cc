#include "server/api/errands.h"

namespace dejavu {

Errands::~Errands() {
  Stop();
  thread_.join();
}

void Errands::Stop() {
  MutexLock lock(mutex_);
  stopping_ = true;
  changed_.NotifyAll();
}

bool Errands::Post(std::shared_ptr<Errand> errand) {
  MutexLock lock(mutex_);
  if (stopping_) {
    errand->run = nullptr;  // it holds the call
    return false;
  }
  errands_.push_back(std::move(errand));
  changed_.NotifyAll();
  return true;
}

void Errands::Run() {
  while (true) {
    std::shared_ptr<Errand> errand;
    {
      MutexLock lock(mutex_);
      while (errands_.empty() && !stopping_) changed_.Wait(mutex_);
      if (errands_.empty()) return;
      errand = std::move(errands_.front());
      errands_.pop_front();
    }
    errand->run();
    errand->run = nullptr;  // it holds the call
  }
}

bool Errands::Pause(const Errand& errand, SteadyTime::duration time) {
  MutexLock lock(mutex_);
  if (!stopping_) changed_.WaitUntil(mutex_, std::chrono::steady_clock::now() + time);
  return !stopping_ && !errand.cancelled;
}

}  // namespace dejavu
