// The stacks of a kernel's threads, and switches between a thread and the scheduler.
#ifndef DIFFMIC_EMULATOR_FIBERS_H_
#define DIFFMIC_EMULATOR_FIBERS_H_

#include "launch_state.h"

namespace diffmic::emulator {

unsigned char* TakeStack();  // kStack bytes, from a pool that is reused by later launches
void GiveBackStacks();       // returns all stacks to the pool

// The first switch to the thread calls `entry`, which never returns.
void Prepare(Thread& thread, void (*entry)());
void SwitchTo(Thread& thread);  // returns when that thread calls SwitchBack
void SwitchBack();              // from the running thread to the scheduler

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_FIBERS_H_
