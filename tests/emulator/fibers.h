// The stacks of a kernel's threads, and the switches between them and the scheduler's.
#ifndef DIFFMIC_EMULATOR_FIBERS_H_
#define DIFFMIC_EMULATOR_FIBERS_H_

#include "launch_state.h"

namespace diffmic::emulator {

unsigned char* TakeStack();  // kStack bytes, from a store that is kept from launch to launch
void GiveBackStacks();       // all of them

// The first switch to the thread calls `entry`, which never returns.
void Prepare(Thread& thread, void (*entry)());
void SwitchTo(Thread& thread);  // returns at that thread's SwitchBack
void SwitchBack();              // from the running thread to the scheduler

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_FIBERS_H_
